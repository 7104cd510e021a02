"""What moves in a notebook: live charts, dashboard, planner, inspector, labeller."""
