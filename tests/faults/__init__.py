"""A range server over HTTP/1.1 that fails as told: named faults, seeded, over plain TCP and TLS. Stdlib only.

    python3 -m tests.faults --image FILE --port 0 --port-file F --faults 'truncate=0.05,stall=0.01' --seed 7

runs it alone (__main__.py); FaultServer (server.py) runs it inside a loop, FaultProcess (process.py) beside a
test, and control.py reaches one in another process. A plan gives each fault a probability; what the n-th
request gets depends on (plan, seed, n) alone, and on nothing that happened before. NAME=PROBABILITY:VALUE
changes the number in brackets.

    request fault    what is on the wire
    ---------------  -------------------------------------------------------------------------------------
    truncate         the right head, a part of the body, FIN
    whole            200 with the whole file, as if there had been no Range
    other-range      206 with another range: shifted, or shorter than asked; head and body agree
    other-etag       206 with another strong ETag
    no-etag          206 without an ETag
    wrong-length     206, the right Content-Range, and a Content-Length and body of another length
    encoding         206 with Content-Encoding: gzip
    error            500, 502, 503 or 504 (that status) with a short text
    busy             429 with Retry-After (of 1 s)
    reset-head       RST instead of an answer
    reset            the right head, a part of the body, RST
    stall-head       nothing (for ever, or so many seconds, then the right answer)
    stall            the right head, a part of the body, nothing (for ever, or so many seconds, then the rest)
    drip             the right answer, 1 KiB at a time, at (32768) bytes per second
    redirect         302 to an address of this server that gives the right answer; asked there, it goes on as
                     without a fault
    redirect-always  302 to an address that gives a 302 to the next one, without an end
    redirect-loop    302 from one of two addresses to the other
    no-http          a line that is not HTTP, FIN
    hangup           the right answer, FIN without a Connection: close

    connection fault what is on the wire
    ---------------  -------------------------------------------------------------------------------------
    drop             accepted, RST at once
    mute             accepted, and nothing ever said, no TLS handshake either
    plain-http       (TLS only) HTTP as it is in answer to the ClientHello, FIN
    stranger         (TLS only) a certificate of a CA that nobody trusts

    state of the     what is on the wire
    server
    ---------------  -------------------------------------------------------------------------------------
    gone             running connections get RST, new ones are refused: nobody listens; back() listens again
    blackhole        connections are established (by the kernel) and nothing is said on them, in the middle of
                     a body or TLS handshake too; back() goes on where it stopped

No fault gives wrong bytes in an answer that is right otherwise: there is no checksum at the source, nobody
could notice. Where an answer must not be used (whole, other-etag, no-etag, wrong-length, encoding) every bit
of its body is turned over, so that a client which uses it is found out.

A healthy answer is 206 with a strong ETag (200 without a Range, 412 when If-Match names another version, 416
behind the end), after `latency_s`, and all bodies together are sent at `bytes_per_s`.
"""

from tests.faults.content import Content
from tests.faults.ledger import Coverage, Entry, coverage
from tests.faults.plan import CONNECTION_FAULTS, REQUEST_FAULTS, Plan
from tests.faults.server import FaultServer

__all__ = [
    "CONNECTION_FAULTS",
    "REQUEST_FAULTS",
    "Content",
    "Coverage",
    "Entry",
    "FaultServer",
    "Plan",
    "coverage",
]
