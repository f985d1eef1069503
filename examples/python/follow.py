"""Follows what the Usher agent decides about this instance. Python 3.8 or newer, standard library only."""
import http.client, json, os, random, sys, threading, time, urllib.request

AGENT = os.environ.get("USHER_AGENT", "http://127.0.0.1:7401")
FAILURES = (OSError, http.client.HTTPException)
# Without a proxy, which the environment may name: the agent is in the same pod.
HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def pause():
    time.sleep(0.5 + random.random() / 2)


def events(last=""):
    while True:
        try:
            request = urllib.request.Request(AGENT + "/v1/events", headers={"Last-Event-ID": last} if last else {})
            with HTTP.open(request, timeout=45) as answer:  # the agent says something every 15 s
                field = {}
                for line in answer:
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    field[name] = value
                    if line == b"\n":  # an event is whole once an empty line follows it
                        if "data" in field:
                            last = field["id"]
                            yield json.loads(field["data"])
                        field = {}
        except FAILURES as error:
            print(f"usher: {error}, trying again", file=sys.stderr)
        pause()


def report(state, cause):  # until the agent has heard it
    body = json.dumps({"state": state, "cause": cause}).encode()
    while True:
        try:
            HTTP.open(urllib.request.Request(AGENT + "/v1/availability/readiness", body, method="PUT"), timeout=5).close()
            return
        except FAILURES as error:
            print(f"usher: {error}, trying again", file=sys.stderr)
        pause()


def report_ready():
    threading.Thread(target=report, args=("ACCEPTING_TRAFFIC", "caches are warm"), daemon=True).start()


report_ready()
working = False  # on what nobody waits for: queues, timers
for event in events():
    if event.get("missed"):  # the agent may have been restarted
        report_ready()
    working = event["type"] == "online" or working and event["type"] != "draining"
    print(f"{event['type']}: {event['cause']}; background work: {str(working).lower()}", flush=True)
