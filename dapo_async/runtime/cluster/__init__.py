"""The connection to Ray.

address        which Ray: one of this run's own or a running cluster
environment    what Ray reads from the environment when it is imported
planned_actors what a run starts and what Ray reserves for it
ports          who listens where in network.ports
ray_variables  whether Ray can read the RAY_ variables of the user
own_ray        whether this machine can start an own Ray, and what to change
connect        starts or joins Ray
placement      plans which node of a joined cluster gets which actors
reservation    reserves what is planned, as Ray's placement groups
connection     the driver's connection from its start to the end of Ray
jobs           submits, follows and stops a job of a cluster
orphan_reaper  ends an own Ray whose driver was killed
"""
