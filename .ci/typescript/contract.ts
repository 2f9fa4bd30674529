// A client made from /openapi.json alone: all its types come from there, and the compiler checks them.
// usage: node built/contract.js SERVICE_URL IMAGE_URL VOICE_ID
import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

type SpeechJob = components["schemas"]["JobPromptTTS"];
type Problem = components["schemas"]["ErrorBody"];

const [service = "", imageUrl = "", voiceId = ""] = process.argv.slice(2);
// The routes return JSON or an event stream; naming one here gives the responses that type alone.
const client = createClient<paths, "application/json">({ baseUrl: service });

const job: SpeechJob = { image_url: imageUrl, prompt: "The pet looks up and talks", text: "Typed and sound.", voice_id: voiceId, fit: "video" };
// @ts-expect-error  no such fit
const invalidFit: SpeechJob = { ...job, fit: "longest" };
// @ts-expect-error  the voice is missing
const missingVoice: SpeechJob = { image_url: imageUrl, prompt: "x", text: "y" };

function explain(problem: Problem): string {
  const errors = problem.errors?.map(({ loc, msg }) => `${loc.join(".")}: ${msg}`) ?? [];
  const paidFor = problem.partial?.audio_url ?? "nothing";
  return [`${problem.category} (${problem.provider ?? "the service"}): ${problem.detail}`, ...errors, `paid for: ${paidFor}`].join("\n");
}

async function makeVideo(): Promise<void> {
  const { data, error } = await client.POST("/jobs_prompt_tts", { body: job });
  if (error) throw new Error(explain(error));
  const urls: string[] = [data.audio_url, data.video_url, data.final_url];
  console.log(urls.join("\n"));
}

async function sendInvalidJobs(): Promise<void> {
  for (const body of [invalidFit, missingVoice]) {
    const { data, error, response } = await client.POST("/jobs_prompt_tts", { body });
    if (data || response.status !== 400) throw new Error(`not rejected: ${response.status}`);
    console.log(explain(error));
  }
}

await makeVideo();
await sendInvalidJobs();
