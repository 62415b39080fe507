"""Hypercorn's protocol classes, with what HTTP demands of them and they do not do. None of them is patched.

HTTP/1.1: refusals in OpenAI's shape, and counted; empty lines before a request. HTTP/2: a stream that can be reset
alone, back-pressure that holds when the client's window is closed, uploads that do not hold each other up. Both: the
method in its own letter case. Nothing here knows of scheduling or of the upstream.
"""

from trioproxy.protocols.http_server import HttpServer
from trioproxy.protocols.parser import PARSER, Parser, Refusing

__all__ = ["PARSER", "HttpServer", "Parser", "Refusing"]
