"""What a run records and shows: metrics, rollouts, timeline, pictures, MLflow. Used by `runtime/`.

run_dir         the files of a run directory
timeline        the state clocks of all actors: totals, idle shares, a Chrome/Perfetto trace
sinks           everything that shows a running run
terminal        one line per step; live_display: the display of a terminal
mlflow_store    the run in MLflow, off the training path; mlflow_run: its calls
panels          which curves of a run are drawn; charts: drawing; plot: the picture dynamics.png
report          the HTML page; report_reading, report_page, rollout_tokens and verdict are its parts

docs/metrics.md explains every number.
"""
