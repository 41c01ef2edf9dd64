"""The quickstart's report: one self-contained HTML page with tables and pictures."""
