"""What an `Analysis` looks like: a table, files, charts for light and dark pages, one page with all.

    text       lines for a terminal
    files      CSV, JSON, SVG and the page, into a folder
    page       ``report.html``, which needs nothing else
    figures    names of the charts, and how each is drawn: curves, overtime, policies, money, icicle
    chart      a figure and its SVG;  palette: its colours;  tree: the hottest paths

Nothing here computes results; that is `kvcm_ray.optimizer.analysis`.
"""
