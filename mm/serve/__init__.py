"""What `mm serve` is made of.

app.py       Server: the model, its routes, what they share          run.py      it under uvicorn      cli.py
guard.py     what every request passes first                         connection.py   errors.py   places.py   limits.py
forms.py     requests, field by field                                options.py   -> options of decoding
parts.py     messages and their media                                uploads.py   toolcalls.py
worker.py    the model's thread                                      chat.py   completions.py   other.py   wire.py
body.py      JSON and base64, checked                                formats.py   media by their first bytes
address.py   URLs and addresses that may be reached                  fetch.py     data: URLs, hosts allowed by name
media.py     bytes -> Media, decoded in a child of nursery.py        metrics.py   page/
"""
