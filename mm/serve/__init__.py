"""What `mm serve` is made of.

limits.py    what a stranger may ask for, and the fixed codes of what is refused
body.py      JSON and base64, checked            formats.py   media by their first bytes
address.py   URLs and addresses that may be reached           fetch.py   data: URLs, and hosts allowed by name
media.py     bytes -> Media, decoded in a child process of nursery.py
"""
