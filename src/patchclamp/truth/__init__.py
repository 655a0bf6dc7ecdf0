"""Planted truth: networks whose units are known by construction, with their data and controls.

A method that is to be believed on a trained network must first find what was put
here, and must not find it in the controls: shuffled labels, random weights, decoys.
"""
