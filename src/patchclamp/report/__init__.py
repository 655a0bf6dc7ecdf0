"""From a document to what people read: findings as JSON, and one self-contained page.

`report` sees documents and findings, never tensors, so a page can be drawn again
from its JSON on a machine that has neither the model nor torch.
"""

from patchclamp.report.architecture_drawing import architecture_svg
from patchclamp.report.json_form import read_document, write_findings
from patchclamp.report.page import render, write_page
from patchclamp.report.png import encode_png

__all__ = [
    "architecture_svg",
    "encode_png",
    "read_document",
    "render",
    "write_findings",
    "write_page",
]
