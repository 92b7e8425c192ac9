"""The intervention server: OpenAI-shaped text generation steered per request, and range tables over HTTP.

    neuronlens serve STORE --model PATH_OR_ID

From the outside in: `server` listens, `app` puts the routes together, `guard` and `auth` keep out what must not come
in, `openai_routes`, `table_routes`, `neuron_routes` and `health_routes` answer, `steering` turns a request's
`intervention` into a program, and an `engine` runs it. Needs the extra: pip install 'neuronlens[serve]'.
"""
