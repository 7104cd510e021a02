"""Charts and tables of runs, plans and ledgers: SVG of our own, figures in plotly, the report."""
