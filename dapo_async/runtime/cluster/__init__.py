"""The connection to Ray.

address        which Ray: one of this run's own or a running cluster
environment    what Ray reads from the environment when it is imported
connect        joins or starts Ray; what a run would start
orphan_reaper  ends an own Ray whose driver was killed
"""
