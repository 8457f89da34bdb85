"""The engine that drives an SGLang server over HTTP; SGLang itself is never imported.

engine      the `Engine` protocol on top of the client
client      calls to the server, each with a deadline
server      starts and stops the server process
stream      reads the tokens of a response as they come
supervisor  ends the server when its actor has ended
"""

# Environment variable with the API key of running servers. A config would store the key on disk.
SERVER_KEY = "SGLANG_API_KEY"
