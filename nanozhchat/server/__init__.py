"""Web page and OpenAI-style API over trained models.

`schemas` what may be asked, `answers` the way back, `scheduler` requests -> one running batch, `library` which models,
`guard` what is checked before any route, `rich_text` Markdown -> safe HTML, `runs` what trainings wrote, `app` the
routes, `serve` sockets and process life, `static/` the pages.
"""
