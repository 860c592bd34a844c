"""Web page and OpenAI-style API over one loaded model.

`schemas` wire format and its errors, `scheduler` requests -> engine, `guard` what is checked before any route,
`app` the routes, `serve` sockets and process life, `static/` the page.
"""
