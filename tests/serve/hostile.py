"""URLs and addresses that must lead nowhere, by how they try."""

from __future__ import annotations

from itertools import product

# One address, or a network's, each in another way.
SPELLINGS = r"""
127.0.0.1 127.1 127.0.1 127.00000.1 0.0.0.0 0 2130706433 017700000001 0177.0.0.1 0177.0.0.01 0x7f000001 0x7f.0.0.1
0x7f.1 127.0.0.1. 127.255.255.254 10.0.0.1 10.1 172.16.0.1 192.168.0.1 192.168.257 169.254.169.254 2852039166
0xa9fea9fe 0251.0376.0251.0376 100.64.0.1 100.100.100.200 192.0.0.192 198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255
[::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:0:127.0.0.1] [::127.0.0.1] [fe80::1]
[fe80::1%25eth0] [fc00::1] [fd00:ec2::254] [ff02::1] [64:ff9b::7f00:1] [64:ff9b::127.0.0.1] [64:ff9b:1::7f00:1]
[2002:7f00:1::] [2001:0:7f00:1::] [2001:db8::1] [::ffff:169.254.169.254] localhost localhost. LOCALHOST
localhost.localdomain ip6-localhost 127.0.0.1.nip.io metadata.google.internal metadata 0.example ①②⑦.⓪.⓪.① 127。0。0。1
⑯⑨。②⑤④。⑯⑨｡②⑤④ locaｌhost 127.0.0.1%00 %6c%6f%63alhost
""".split()
SCHEMES = """
file ftp sftp tftp gopher dict ldap ldaps smb jar netdoc ws wss unix http+unix httpx view-source javascript blob about
s3 gs imap pop3 smtp telnet ssh git rtsp rtmp hls concat subfile pipe fd tcp udp cache expect phar zip php vbscript
""".split()
# What parsers read differently: users, ports, separators, escapes, letters beyond ASCII.
CONFUSED = r"""
http://images.example@127.0.0.1/ http://127.0.0.1@images.example/ http://a:b@images.example/
http://images.example:80@127.0.0.1/ http://@127.0.0.1/ http://@images.example/ http://images.example%40127.0.0.1/
http://images.example\@127.0.0.1/ http://127.0.0.1\@images.example/ http://images.example\.127.0.0.1/
http:\\127.0.0.1/ http:/\127.0.0.1/ http:127.0.0.1 http:/127.0.0.1/ http:///127.0.0.1/ http:////images.example/
//127.0.0.1/ ///127.0.0.1/ 127.0.0.1/ http://[images.example]/ http://images.example:/x http://images.example:0/
http://images.example:22/ http://images.example:6379/ http://images.example:8080/ http://images.example:65616/
http://images.example:080000/ http://images.example:80:80/ http://images.example:+80/ http://images.example:８０/
http://images.example:-1/ http://images.example.127.0.0.1.nip.io/ http://127.0.0.1.images.example/
http://images.example.evil.example/ http://ximages.example/ http://images.example./ http://images..example/
http://.images.example/ http://images%2eexample/ http://images.example%2f@127.0.0.1/
http://images.example%00.evil.example/ http://images.example%20.evil.example/ http://images.example%09/
http://*.example/ http://*/ http://images.example&@127.0.0.1/ http://127.0.0.1;images.example/
http://images.example,127.0.0.1/ http://images.example|127.0.0.1/ http://[::1]images.example/
http://images.example[::1]/ http://[::1]@images.example/ http://[::1%25images.example]/ http://[v1.x]/
hthttp://tp://127.0.0.1/ url:http://127.0.0.1/ http://http://127.0.0.1/ http://https://images.example/
http:images.example HTTP://LOCALHOST/ hTTp://127.0.0.1/ http://ⓔxample.com/ http://ımages.example/
http://images。example/ http://images.example／127.0.0.1/
""".split()
CONFUSED += [
    "http://images.example\t@127.0.0.1/",
    "http://images.example\r\nHost: 127.0.0.1/",
    "http://images.example/\r\nHost: 127.0.0.1\r\n\r\n",
    "http://images.example/ HTTP/1.1\r\nHost: 127.0.0.1",
    "\x00http://127.0.0.1/",
    " http://127.0.0.1/",
    "http://127.0.0.1 /",
    "ht\ntp://127.0.0.1/",
    "http://images.example/é",
    "http://images.example/" + "a" * 10_000,
    "",
    "http://",
    "http:",
]
# Addresses as a resolver gives them.
PRIVATE = """
127.0.0.1 127.8.8.8 0.0.0.0 0.1.2.3 10.0.0.1 10.255.0.1 172.16.0.1 172.31.255.1 192.168.1.1 169.254.169.254 100.64.0.1
100.127.255.254 192.0.0.8 192.0.0.192 192.0.2.1 192.88.99.1 198.18.0.1 198.19.255.1 198.51.100.1 203.0.113.9
224.0.0.251 239.255.255.250 240.0.0.1 255.255.255.255 ::1 :: ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254
::ffff:0:7f00:1 ::127.0.0.1 ::10.0.0.1 fe80::1 fe80::1%lo fec0::1 fc00::1 fd00:ec2::254 ff02::1 ff0e::1
64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::7f00:1 64:ff9b:1:fffe::1 2002:7f00:1:: 2002:a00:1::1
2002:5db8:d70e::1 2001:0:7f00:1:: 2001::1 2001:10::1 2001:20::1 2001:db8::1 3fff::1 100::1 2606:4700::5efe:7f00:1
2606:4700::200:5efe:a00:1 5f00::1 4000::1 nonsense
""".split()


def direct_urls(port: int) -> list[str]:
    """Addresses in every spelling and port, other schemes, and what parsers read differently."""
    ports = ("", ":80", ":443", f":{port}")
    urls = [f"{scheme}://{host}{at}/x" for scheme, host, at in product(("http", "https"), SPELLINGS, ports)]
    hosts = ("images.example", f"127.0.0.1:{port}", "")
    return urls + [f"{scheme}://{host}/etc/passwd" for scheme, host in product(SCHEMES, hosts)] + CONFUSED
