// client.js in a TypeScript project: its types agree with /openapi.json, and reject what the service rejects.
// usage: node built/video.js SERVICE_URL IMAGE_URL VOICE_ID
import type { components } from "./api.js";
import { VideoError, makeVideo } from "./client.js";
import type { Category, ErrorCode, FieldError, FieldErrorCode, Options, PaidFor, Problem, PromptJob, SpeechJob } from "./client.js";
import type { SpeechVideo, StageEvent, Video } from "./client.js";

type Schemas = components["schemas"];
type Same<A, B> = [A, B, keyof A, keyof B] extends [B, A, keyof B, keyof A] ? true : never;
/** All that the service may send is described; a field that it does not send yet is optional. */
type Covers<Ours, Theirs> = [Theirs, keyof Theirs] extends [Ours, keyof Ours] ? true : never;
type SameCodes<Ours, Body> = Body extends { code?: infer Code } ? Same<Ours, NonNullable<Code>> : true;
// This does not compile if one side has a field or a value that the other has not.
const agreeing: [
  Same<PromptJob, Schemas["JobPromptOnly"]>,
  Same<SpeechJob, Schemas["JobPromptTTS"]>,
  Covers<Video, Schemas["VideoResult"]>,
  Covers<SpeechVideo, Schemas["SpeechResult"]>,
  Covers<StageEvent, Schemas["StageEvent"]>,
  Covers<PaidFor, Schemas["PartialResult"]>,
  Covers<FieldError, Schemas["InputError"]>,
  Covers<Problem, Schemas["ErrorEvent"]>,
  Same<Category, Schemas["ErrorBody"]["category"]>,
  SameCodes<ErrorCode, Schemas["ErrorBody"]>,
  SameCodes<FieldErrorCode, Schemas["InputError"]>,
] = [true, true, true, true, true, true, true, true, true, true, true];

const [service = "", image_url = "", voice_id = ""] = process.argv.slice(2);
const job: PromptJob = { image_url, prompt: "The pet looks up and talks" };
const speechJob: SpeechJob = { ...job, text: "Typed and sound.", voice_id, fit: "video" };
const options: Options = {
  service,
  key: crypto.randomUUID(),
  headers: async () => ({ Authorization: "Bearer x" }),
  credentials: "include",
  onStage: ({ stage, state, ahead }) => console.log(stage, state, ahead ?? ""),
};

async function makeBoth(): Promise<void> {
  const video = await makeVideo(speechJob, options);
  const urls: string[] = [video.audio_url, video.video_url, video.final_url];
  const silent = await makeVideo(job, { service });
  // @ts-expect-error  a silent video may have no final_url
  const missing: string = silent.final_url;
  const heard: number = (video.audio_seconds ?? 0) - (video.cut_seconds ?? 0);
  console.log([...urls, silent.video_url, `missing: ${missing}`, `heard: ${heard >= 0}`].join("\n"));
}

async function sendInvalidJob(): Promise<void> {
  try {
    // @ts-expect-error  an unknown field
    await makeVideo({ image_url, prompt: "x", duration: 10 }, { service });
  } catch (error) {
    if (!(error instanceof VideoError)) throw error;
    console.log(error.category, error.retryable, error.errors[0]?.loc.join("."), error.partial.audio_url ?? "nothing paid");
  }
}

/** Never called: none of this must compile. */
export function mustNotCompile(): void {
  // @ts-expect-error  a text, but no voice
  void makeVideo({ image_url, prompt: "x", text: "y" }, { service });
  // @ts-expect-error  no such fit
  void makeVideo({ image_url, prompt: "x", text: "y", voice_id, fit: "longest" }, { service });
  // @ts-expect-error  no service
  void makeVideo(job, { key: "k" });
  // @ts-expect-error  headers must be text
  void makeVideo(job, { service, headers: { Authorization: 1 } });
}

const TEXTS: Partial<Record<ErrorCode, string>> = { busy: "Gleich noch einmal", deadline: "Das hat zu lange gedauert" };

/** What a front end shows: by its code, or else as the service says it. */
export function textOf(error: VideoError): string {
  if (error.code === "connection_failed") return "Keine Verbindung";
  const text = TEXTS[error.code as ErrorCode];
  return text ?? error.detail;
}

console.log(`${agreeing.length} types agree with the contract`);
await makeBoth();
await sendInvalidJob();
