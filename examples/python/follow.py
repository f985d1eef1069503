"""Follows what the Usher agent decides about this instance. Python 3.8 or newer, standard library only."""
import http.client, json, os, random, sys, time, urllib.request

AGENT = os.environ.get("USHER_AGENT", "http://127.0.0.1:7401")
FAILURES = (OSError, http.client.HTTPException)


def events(last=""):
    while True:
        try:
            request = urllib.request.Request(AGENT + "/v1/events", headers={"Last-Event-ID": last} if last else {})
            with urllib.request.urlopen(request, timeout=45) as answer:  # the agent says something every 15 s
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
        time.sleep(0.5 + random.random() / 2)


def report(state, cause):
    body = json.dumps({"state": state, "cause": cause}).encode()
    try:
        urllib.request.urlopen(urllib.request.Request(AGENT + "/v1/availability/readiness", body, method="PUT"), timeout=5)
    except FAILURES as error:
        print(f"usher: {error}", file=sys.stderr)


report("ACCEPTING_TRAFFIC", "caches are warm")
working = False  # on what nobody waits for: queues, timers
for event in events():
    if event.get("missed"):  # the agent may have been restarted
        report("ACCEPTING_TRAFFIC", "caches are warm")
    working = event["type"] == "online" or working and event["type"] != "draining"
    print(f"{event['type']}: {event['cause']}; background work: {str(working).lower()}", flush=True)
