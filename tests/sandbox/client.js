// @ts-check
/**
 * The client of the service's two job routes: one file without dependencies, for browsers and Node 20. Copy it.
 *
 *     const video = await makeVideo(job, { service, key: crypto.randomUUID(), onStage: console.log });
 *
 * @typedef {{ image_url: string, prompt: string, seconds?: number, resolution?: string, model?: string | null }} PromptJob
 * @typedef {PromptJob & { text: string, voice_id: string, fit?: "shortest" | "video" | "speech" }} SpeechJob
 * @typedef {{ video_url: string, audio_url?: string, final_url?: string }} Video
 * @typedef {"speech" | "audio_upload" | "video" | "download" | "mux" | "final_upload"} Stage
 * @typedef {{ stage: Stage, state: "started" | "progress" | "done", seconds: number, status?: string | null,
 *   percent?: number | null }} StageEvent
 * @typedef {{ audio_url?: string | null, video_url?: string | null, prediction_id?: string | null }} PaidFor
 * @typedef {{ loc: (string | number)[], msg: string }} Fault
 * @typedef {"configuration" | "validation" | "provider" | "resource" | "internal" | "network"} Category
 * @typedef {{ detail: string, category: Category, provider?: string | null, request_id?: string | null, retryable?: boolean,
 *   status?: number, partial?: PaidFor | null, errors?: Fault[] | null }} Problem
 *
 * @typedef {object} Options
 * @property {string} service  its address, such as https://pets.example.com
 * @property {string} [key]  one per job. With it a job outlives its connection and is repeated until there is an answer, and still
 *   one video is paid for. Without it nothing is repeated, since each try would be paid for, and a lost connection cancels the job.
 * @property {AbortSignal} [signal]  ends the waiting (its reason is thrown) and, without a key, the job
 * @property {(stage: StageEvent) => void} [onStage]  each try of a job with a key tells the stages so far again
 * @property {(error: VideoError, seconds: number) => void} [onRetry]  why, and in how many seconds, the job is sent again
 * @property {number} [patience]  seconds spent between tries, in all, before the last error is thrown
 * @property {number} [silence]  seconds without a byte, after which the stream of a job with a key counts as broken
 */

/** Every way in which a job can fail. `category` is the service's word, or "network" if the service did not get to answer. */
export class VideoError extends Error {
  /** @param {Problem} problem  @param {ErrorOptions} [options] */
  constructor(problem, options) {
    super(problem.detail, options);
    this.name = "VideoError";
    this.category = problem.category;
    this.retryable = problem.retryable === true; // the same job, with the same key, can succeed later
    this.errors = problem.errors ?? []; // which field is at fault: `loc` ends with its name
    this.partial = problem.partial ?? {}; // what is paid for and still usable
    this.provider = problem.provider ?? null;
    this.requestId = problem.request_id ?? null;
    this.status = problem.status ?? null;
  }
}

/**
 * Make a video: with speech if the job has a `text`, else a silent one, which has a `video_url` alone.
 *
 * @overload  @param {SpeechJob} job  @param {Options} options  @returns {Promise<Required<Video>>}
 * @overload  @param {PromptJob} job  @param {Options} options  @returns {Promise<Video>}
 * @param {PromptJob | SpeechJob} job
 * @param {Options} options
 * @returns {Promise<Video>}
 */
export async function makeVideo(job, options) {
  const { key, signal, onRetry, patience = 600 } = options;
  let [paid, paused] = [/** @type {PaidFor} */ ({}), 0];
  for (let longest = 1; ; longest = Math.min(2 * longest, 15)) {
    try {
      return await ask(job, options);
    } catch (error) {
      signal?.throwIfAborted();
      if (!(error instanceof VideoError)) throw error;
      paid = error.partial = { ...paid, ...error.partial }; // a later try may know less than an earlier one
      const pause = longest * (0.75 + 0.25 * Math.random()); // so that a thousand pages do not come back all at once
      if (key == null || !error.retryable || paused + pause > patience) throw error;
      onRetry?.(error, pause);
      paused += pause;
      await sleep(pause, signal);
    }
  }
}

/** Send the job once. @param {PromptJob | SpeechJob} job  @param {Options} options  @returns {Promise<Video>} */
async function ask(job, options) {
  const request = requestFor(job, options);
  try {
    const response = await fetch(request);
    // What is refused at once is plain JSON, and so is everything if a proxy on the way dropped the Accept header.
    const streamed = response.body && response.headers.get("Content-Type")?.startsWith("text/event-stream");
    return await (streamed ? readStream(response, options) : readJson(response));
  } catch (error) {
    if (error instanceof VideoError) throw error;
    const detail = "The connection failed before the video was there.";
    throw new VideoError({ category: "network", retryable: true, detail }, { cause: error });
  }
}

/** @param {PromptJob | SpeechJob} job  @param {Options} options */
function requestFor(job, { service, key, signal }) {
  const route = "text" in job && job.text != null ? "jobs_prompt_tts" : "jobs_prompt_only";
  const accept = "body" in Response.prototype ? "text/event-stream" : "application/json"; // React Native cannot read streams
  const headers = { "Content-Type": "application/json", Accept: accept, ...(key == null ? {} : { "Idempotency-Key": key }) };
  try {
    return new Request(`${service.replace(/\/+$/, "")}/${route}`, { method: "POST", headers, body: JSON.stringify(job), signal: signal ?? null });
  } catch (error) {
    // An address or a key that cannot even be sent: no use trying again.
    throw new VideoError({ category: "validation", detail: `The job cannot be sent: ${error}` }, { cause: error });
  }
}

/** @param {Response} response  @param {Options} options  @returns {Promise<Video>} */
async function readStream(response, { key, onStage, silence = 45 }) {
  const body = /** @type {ReadableStream<Uint8Array>} */ (response.body);
  // The service says something every 15 s; behind a proxy that holds it back, only a job with a key can be asked for again.
  for await (const { event, data } of serverSentEvents(body, key == null ? 0 : silence)) {
    if (event === "stage") tell(onStage, JSON.parse(data));
    if (event === "result") return JSON.parse(data);
    if (event === "error") throw new VideoError(JSON.parse(data)); // the HTTP status was sent long ago: the event has its own
  }
  const detail = "The answer ended before the video was there.";
  throw new VideoError({ category: "network", retryable: true, detail, request_id: response.headers.get("X-Request-ID") });
}

/** @param {Response} response  @returns {Promise<Video>} */
async function readJson(response) {
  const { ok, status, headers } = response;
  const body = await response.json().catch(() => null); // a proxy's error page is no JSON
  if (ok && body?.video_url) return body;
  if (body?.category) throw new VideoError({ ...body, status });
  const detail = `An answer with status ${status} came, but not from the service.`;
  const retryable = ok || status >= 500 || status === 408 || status === 429; // any other 4xx will stay
  throw new VideoError({ category: "network", retryable, detail, status, request_id: headers.get("X-Request-ID") });
}

/** A display that fails is no reason to lose a video. @param {Options["onStage"]} onStage  @param {StageEvent} stage */
function tell(onStage, stage) {
  try {
    onStage?.(stage);
  } catch (error) {
    console.error(error);
  }
}

/** @param {number} seconds  @param {AbortSignal} [signal]  @returns {Promise<void>} */
function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted(); // by onRetry, for one
    const stop = () => (clearTimeout(timer), reject(signal?.reason));
    const timer = setTimeout(() => (signal?.removeEventListener("abort", stop), resolve()), 1000 * seconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}

/**
 * The events of a body, read as the standard says. (EventSource would do this, but it cannot POST.) A chunk may end anywhere: in
 * a line, in a CRLF, in a character of several bytes. After `silence` seconds without a byte (0: never) the body counts as ended.
 *
 * @param {ReadableStream<Uint8Array>} body  @param {number} [silence]
 * @returns {AsyncGenerator<{ event: string, data: string }, void>}
 */
export async function* serverSentEvents(body, silence = 0) {
  const reader = body.getReader(); // `for await (const chunk of body)` is not in every Safari
  const hangUp = () => void reader.cancel().catch(() => {});
  const decoder = new TextDecoder(); // with { stream: true } it keeps half a character for the next chunk
  let [rest, event, afterCR, data] = ["", "", false, /** @type {string[]} */ ([])];
  let alarm = /** @type {ReturnType<typeof setTimeout> | undefined} */ (undefined);
  try {
    for (;;) {
      if (silence) alarm = setTimeout(hangUp, 1000 * silence);
      const { value, done } = await reader.read();
      clearTimeout(alarm);
      if (done) return; // an event without its blank line is dropped, as the standard wants it
      const text = decoder.decode(value, { stream: true });
      const lines = (rest + (afterCR ? text.replace(/^\n/, "") : text)).split(/\r\n|\n|\r/);
      if (text) afterCR = text.endsWith("\r"); // a line has ended; a LF at the start of the next chunk belongs to it
      rest = lines.pop() ?? "";
      for (const line of lines) {
        const [, name, content = ""] = line.match(/^([^:]*)(?:: ?(.*))?$/s) ?? []; // a comment has an empty name
        if (name === "event") event = content;
        else if (name === "data") data.push(content);
        else if (line === "") {
          if (data.length) yield { event: event || "message", data: data.join("\n") };
          [event, data] = ["", []];
        }
      }
    }
  } finally {
    clearTimeout(alarm);
    hangUp(); // also when the caller stops listening: the connection closes
  }
}
