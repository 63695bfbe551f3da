"""`python -m bench`: what Kiln costs, measured beside what it is built on, in the same run on the same machine.

build_time.py   a build's time to `succeeded`, beside plain `packer build`
build_phases.py where a build's time goes
submissions.py  submissions a second and their latency, beside bare `start_workflow`
log_stream.py   a log line's way from its writer to its readers, beside a bare socket
containers.py   a container build's time to `success`, beside `docker buildx build --push`, alone and many at once
organization.py signed lists of an organization's images beside `GET /healthz`: 20 of 200, and of 100,000, on both databases
uploads.py      taking a build context in, beside nginx and `gzip -dc | tar -t`, and the memory that it takes
drivers/        the processes that make and measure the load, so that nothing else runs beside them in one interpreter
"""
