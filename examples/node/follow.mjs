// Follows what the Usher agent decides about this instance. Node 18 or newer, no library.
const agent = process.env.USHER_AGENT ?? 'http://127.0.0.1:7401';

const pause = () => new Promise((again) => setTimeout(again, 500 + Math.random() * 500));

async function* events(last = '') {
  for (;; await pause()) {
    try {
      const answer = await fetch(`${agent}/v1/events`, { headers: last ? { 'Last-Event-ID': last } : {} });
      if (!answer.ok) throw new Error(await answer.text());
      let text = '';
      for await (const chunk of answer.body.pipeThrough(new TextDecoderStream())) {
        const blocks = (text + chunk).split('\n\n');
        text = blocks.pop(); // an event is whole once an empty line follows it
        for (const block of blocks) {
          const field = Object.fromEntries(block.split('\n').map((line) => line.split(/: (.*)/s)));
          if (!field.data) continue; // a keep-alive
          last = field.id;
          yield JSON.parse(field.data);
        }
      }
    } catch (error) { console.error(`usher: ${error.message}, trying again`); }
  }
}

async function report(state, cause) { // until the agent has heard it
  for (;; await pause()) {
    try {
      const answer = await fetch(`${agent}/v1/availability/readiness`, { method: 'PUT', body: JSON.stringify({ state, cause }) });
      const text = await answer.text();
      if (answer.ok) return;
      throw new Error(text);
    } catch (error) { console.error(`usher: ${error.message}, trying again`); }
  }
}

report('ACCEPTING_TRAFFIC', 'caches are warm');
let working = false; // on what nobody waits for: queues, timers
for await (const { type, cause, missed } of events()) {
  if (missed) report('ACCEPTING_TRAFFIC', 'caches are warm'); // to an agent that was restarted
  if (type === 'online') working = true;
  if (type === 'draining') working = false;
  console.log(`${type}: ${cause}; background work: ${working}`);
}
