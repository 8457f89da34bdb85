"""The run directory (L3): metrics per step, readable rollouts, the timeline, the summary and the picture of a run. Called by `runtime/`.

run_dir       what is written where, and the summary of every exit
timeline      the state clocks of all actors: totals, idle shares, a Chrome/Perfetto trace
picture       the training dynamics as one PNG
report        one page of one or several runs; report_reading, report_charts, report_page: its parts
progress      one line per step; display: the live one of a terminal
mlflow_store  the same run in MLflow, off the training path; mlflow_run: its calls
audience      whoever looks at a run while it goes on: progress and MLflow

README.md explains every metric.
"""
