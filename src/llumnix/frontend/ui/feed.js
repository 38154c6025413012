// What the page gets from the server and asks of it. The key stays in this module's memory.

const RETRY_MS = [500, 1000, 2000, 5000];
let key = "", asked = null;

/** Asks for the feed anew. */
export const again = () => asked?.abort();

export const setKey = (text) => { key = text.trim(); };
const headers = (more = {}) => (key ? { authorization: `Bearer ${key}`, ...more } : more);

/** Reads the feed for ever, each time with `on.query()`. `on.lost(text)`: it is not connected; `on.key(why)` resolves when the
 *  user has given another key. */
export async function follow(on) {
  for (let failures = 0; ; failures++) {
    const { signal } = asked = new AbortController();
    try {
      const answer = await fetch(`v1/events${on.query()}`, { headers: headers(), signal });
      if (answer.status === 401 || answer.status === 403) {
        await on.key(await reason(answer));
        continue;
      }
      if (!answer.ok) throw new Error(await reason(answer));
      failures = 0;
      await read(answer.body, on.event);
      throw new Error("The server has ended the feed");
    } catch (error) {
      if (signal.aborted) continue;
      on.lost(`${error.message || error}. Trying again …`);
      await new Promise((go) => setTimeout(go, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]));
    }
  }
}

async function read(body, onEvent) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split("\n");
      if (lines.length === 2) onEvent(lines[0].slice(7), JSON.parse(lines[1].slice(6)));
    }
  }
}

async function reason(answer) {
  const text = await answer.text();
  try {
    const error = JSON.parse(text).error;
    return (error.message ?? error) || `error ${answer.status}`;
  } catch {
    return `error ${answer.status}`;
  }
}

/** The answer as JSON. Throws an error for the user, `refused` if the key will not do. */
export async function ask(method, path, body) {
  const json = body === undefined ? {} : { "content-type": "application/json" };
  const text = body === undefined ? undefined : JSON.stringify(body);
  const answer = await fetch(path, { method, headers: headers(json), body: text });
  if (answer.ok) return answer.json();
  const error = new Error(await reason(answer));
  error.refused = answer.status === 401 || answer.status === 403;
  throw error;
}
