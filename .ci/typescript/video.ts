// client.js in a TypeScript project: its types agree with /openapi.json, and reject what the service rejects.
// usage: node built/video.js SERVICE_URL IMAGE_URL VOICE_ID
import type { components } from "./api.js";
import { VideoError, makeVideo } from "./client.js";
import type { Category, Video, Options, Problem, PromptJob, SpeechJob, StageEvent } from "./client.js";

type Schemas = components["schemas"];
type Same<A, B> = [A, B, keyof A, keyof B] extends [B, A, keyof B, keyof A] ? true : never;
// This does not compile if one side has a field or a value that the other has not.
const agreeing: [
  Same<PromptJob, Schemas["JobPromptOnly"]>,
  Same<SpeechJob, Schemas["JobPromptTTS"]>,
  Same<Required<Video>, Schemas["SpeechResult"]>,
  Same<StageEvent, Schemas["StageEvent"]>,
  Same<Exclude<Category, "network">, Schemas["ErrorBody"]["category"]>,
  Schemas["ErrorEvent"] extends Problem ? true : never,
] = [true, true, true, true, true, true];

const [service = "", image_url = "", voice_id = ""] = process.argv.slice(2);
const job: PromptJob = { image_url, prompt: "The pet looks up and talks" };
const speechJob: SpeechJob = { ...job, text: "Typed and sound.", voice_id, fit: "video" };
const options: Options = { service, key: crypto.randomUUID(), onStage: ({ stage, state }) => console.log(stage, state) };

async function makeBoth(): Promise<void> {
  const video = await makeVideo(speechJob, options);
  const urls: string[] = [video.audio_url, video.video_url, video.final_url];
  const silent = await makeVideo(job, { service });
  // @ts-expect-error  a silent video may have no final_url
  const missing: string = silent.final_url;
  console.log([...urls, silent.video_url, `missing: ${missing}`].join("\n"));
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
}

console.log(`${agreeing.length} types agree with the contract`);
await makeBoth();
await sendInvalidJob();
