"""What Prometheus and Grafana are told about a manager: dashboards, alert rules, how to scrape.

Generated, so that every expression is checked against the metrics there are; see `kvcm metrics`.
"""
