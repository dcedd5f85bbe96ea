"""Other engines, measured beside this one: each in a process, and if need be an environment, of its own.

`environments` sets a peer up, `side` starts and times it, `worker` is what runs at the other end of the pipe;
`*_worker` are the engines. A worker imports nothing of this package but `worker`, for it may run where only the
peer is installed.
"""
