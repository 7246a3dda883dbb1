"""The HTML report: pages that open from disk, with their data beside them and neither server nor network."""

from raylabel.report.page.write import write_report

__all__ = ["write_report"]
