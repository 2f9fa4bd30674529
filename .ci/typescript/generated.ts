// Clients made from /openapi.json alone, by hey-api and by orval: their types are those of the contract.
import { jobsPromptOnly, jobsPromptTts } from "./hey";
import type { ErrorBody, StageEvent } from "./hey";
import { jobsPromptTts as postSpeechJob } from "./orval";
import type { ErrorBody as OrvalError, JobPromptTTS, StageEvent as OrvalStage } from "./orval";

const body: JobPromptTTS = { image_url: "https://example.com/pet.jpg", prompt: "It talks", text: "Feed me!", voice_id: "Rex" };

export async function withHeyApi(baseUrl: string): Promise<string> {
  const headers = { "Idempotency-Key": crypto.randomUUID() };
  const { data, error } = await jobsPromptTts({ baseUrl, headers, body });
  if (error) throw new Error(explain(error));
  return data.final_url;
}

export async function withOrval(): Promise<string> {
  const response = await postSpeechJob(body, { headers: { "Idempotency-Key": crypto.randomUUID() } });
  if (response.status !== 200) throw new Error(explain(response.data));
  return response.data.final_url;
}

export function explain(error: ErrorBody | OrvalError): string {
  const fields = error.errors?.map(({ loc, msg }) => `${loc.join(".")}: ${msg}`) ?? [];
  return [error.category, error.detail, error.partial?.audio_url ?? "nothing paid", ...fields].join("\n");
}

/** The events of a stream have types, too. */
export function progress(stage: StageEvent | OrvalStage): string {
  return `${stage.stage} ${stage.state} ${stage.seconds.toFixed(1)} ${stage.percent ?? ""}`;
}

/** Never called: none of this must compile. */
export function mustNotCompile(): void {
  // @ts-expect-error  no such fit
  void jobsPromptTts({ body: { ...body, fit: "longest" } });
  // @ts-expect-error  the prompt is missing
  void jobsPromptOnly({ body: { image_url: "https://example.com/pet.jpg" } });
  // @ts-expect-error  the voice is missing
  void postSpeechJob({ image_url: "x", prompt: "y", text: "z" });
}
