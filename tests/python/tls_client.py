"""TLS as Python speaks it: one request, many at once, or none at all.

usage: tls_client.py COMMAND HOST PORT CA CERT KEY [ARGUMENT]   ("-" for a file that is not shown)
"""

import http.client
import json
import socket
import ssl
import sys
import threading
import time
import warnings

warnings.simplefilter("ignore")
command, host, port, ca, cert, key = sys.argv[1:7]
port = int(port)
BODY = {"prompt": "Hi", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def context():
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(ca)
    if cert != "-":
        made.load_cert_chain(cert, key)
    return made


def ask(made, body=None, timeout=60):
    connection = http.client.HTTPSConnection(host, port, context=made, timeout=timeout)
    try:
        if body is None:
            connection.request("GET", "/v1/models")
        else:
            headers = {"content-type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def one():
    """The status and the body, or what went wrong."""
    try:
        print(*ask(context()))
    except OSError as error:
        print("error:", error)


def old():
    """A client of 2010."""
    made = context()
    made.minimum_version = made.maximum_version = ssl.TLSVersion.TLSv1_1
    made.set_ciphers("ALL:@SECLEVEL=0")
    try:
        print(*ask(made))
    except OSError as error:
        print("error:", error)


def serial():
    """What the server shows."""
    with socket.create_connection((host, port), 60) as plain:
        with context().wrap_socket(plain, server_hostname=host) as secure:
            print(secure.getpeercert()["serialNumber"], secure.version())


def load():
    """New connections until standard input ends; what failed."""
    made, over, answers, failures = context, threading.Event(), [], []

    def client():
        while not over.is_set():
            try:
                status, body = ask(made(), BODY)
                text = json.loads(body)["choices"][0]["text"] if status == 200 else body
                answers.append(text) if status == 200 else failures.append(body)
            except OSError as error:
                failures.append(str(error))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    print("begun", flush=True)
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"answers": len(answers), "failures": failures, "texts": len(set(answers))}))


def stream():
    """One long streamed answer: its events and how it ended."""
    connection = http.client.HTTPSConnection(host, port, context=context(), timeout=60)
    body = dict(BODY, max_tokens=int(sys.argv[7]), stream=True)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    events = [line for line in answer.read().decode().splitlines() if line]
    print(len(events), events[-1])


def silent():
    """Connections that say nothing, and the slowest of requests beside them."""
    idle = [socket.create_connection((host, port), 60) for _ in range(int(sys.argv[7]))]
    slowest = 0.0
    for _ in range(20):
        began = time.monotonic()
        status, _ = ask(context())
        assert status == 200, status
        slowest = max(slowest, time.monotonic() - began)
    print(len(idle), slowest)


def openai():
    """The official client, and a channel of gRPC's."""
    import grpc
    import httpx
    from openai import OpenAI

    with httpx.Client(verify=context()) as client:
        api = OpenAI(base_url=f"https://{host}:{port}/v1", api_key="x", http_client=client)
        model = api.models.list().data[0].id
        said = api.completions.create(model=model, prompt="Hi", max_tokens=4).choices[0].text
    read = lambda path: open(path, "rb").read()
    credentials = grpc.ssl_channel_credentials(read(ca), read(key), read(cert))
    with grpc.secure_channel(sys.argv[7], credentials) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
    print("served", len(said) > 0)


{f.__name__: f for f in (one, old, serial, load, stream, silent, openai)}[command]()
