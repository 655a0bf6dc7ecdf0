"""Relevance carried back through every operator of the captured network, by a rule for each.

DeepLift and LRP divide the score, guided backpropagation and DeconvNet bend the gradient, rollout
follows attention. None of them looks at modules: functions, reused layers, writes in place and
residual sums are operators like all others, and one without a rule is refused by name.
"""
