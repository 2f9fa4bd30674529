/**
 * The types of client.js. Copy both files; TypeScript finds this one beside it. `--strict` holds, with
 * the module resolutions `bundler`, `node16` and `nodenext`, and `allowJs` is not needed.
 */

/** A silent video of a picture. */
export interface PromptJob {
  image_url: string;
  prompt: string;
  seconds?: number;
  resolution?: string;
  model?: string | null;
}

/** A video in which the pet speaks. */
export interface SpeechJob extends PromptJob {
  text: string;
  voice_id: string;
  /** What ends the video: whichever ends first (this may cut the speech), the video, or the speech. */
  fit?: "shortest" | "video" | "speech";
}

/** What a job without speech has made. */
export interface Video {
  /** Expires an hour after the video was made. */
  video_url: string;
}

/** What a speech job has made. */
export interface SpeechVideo extends Video {
  audio_url: string;
  final_url: string;
  /** The length of the speech. */
  audio_seconds?: number | null;
  /** The length of the final video. */
  final_seconds?: number | null;
  /** Seconds of speech that are not heard because the video ends before them; 0 if none. */
  cut_seconds?: number | null;
}

export type Stage =
  | "speech"
  | "audio_upload"
  | "video"
  | "download"
  | "convert"
  | "mux"
  | "final_upload";

export interface StageEvent {
  stage: Stage;
  state: "started" | "progress" | "done";
  /** Since the stage started. */
  seconds: number;
  /** Of the prediction, in the stage `video`; "queued" while it waits for its turn at a provider. */
  status?: string | null;
  /** Of the video, where the model tells it. */
  percent?: number | null;
  /** How many jobs are before this one, while it is queued. */
  ahead?: number | null;
  /** The length of the speech, when the stage `speech` is done. */
  audio_seconds?: number | null;
}

/** What a failed job has made already, and what is paid for. */
export interface PaidFor {
  audio_url?: string | null;
  video_url?: string | null;
  prediction_id?: string | null;
}

/** What is wrong with a field. Later versions of the service may add others. */
export type FieldErrorCode =
  | "required"
  | "not_a_string"
  | "blank"
  | "too_long"
  | "not_a_whole_number"
  | "too_small"
  | "too_large"
  | "not_allowed"
  | "wrong_format"
  | "misnamed"
  | "upload_first"
  | "not_a_url"
  | "key_reused"
  | "picture_not_found"
  | "not_a_picture"
  | "private_url"
  | "unknown_model"
  | "model_not_allowed"
  | "invalid_body"
  | "unsupported"
  | "rejected";

/** An invalid field; `loc` ends with its name, such as `["body", "text"]`. */
export interface FieldError {
  loc: (string | number)[];
  msg: string;
  /** What is wrong; for a front end that translates. */
  code?: FieldErrorCode | (string & {}) | null;
  /** What to fill in, such as `{ max: 600, got: 659 }`. */
  params?: Record<string, unknown> | null;
}

export type Category = "configuration" | "validation" | "provider" | "resource" | "internal";

/** What happened. Later versions of the service may add others, so have a text for the unknown. */
export type ErrorCode =
  | "missing_setting"
  | "unauthorized"
  | "spending_limit"
  | "busy"
  | "invalid_body"
  | "body_too_large"
  | "route_not_found"
  | "method_not_allowed"
  | "invalid_field"
  | "key_reused"
  | "unknown_model"
  | "model_not_allowed"
  | "picture_not_found"
  | "not_a_picture"
  | "private_url"
  | "blocked_url"
  | "content_rejected"
  | "prediction_failed"
  | "video_expired"
  | "deadline"
  | "provider_rejected_key"
  | "provider_throttled"
  | "provider_failed"
  | "speech_too_large"
  | "storage_failed"
  | "bucket_not_public"
  | "download_failed"
  | "media_unusable"
  | "machine_failed"
  | "restarting"
  | "internal";

/** The codes that the client itself adds to those of the service. */
export type ClientErrorCode =
  /** The job could not be sent: an invalid address, key or header. */
  | "not_sent"
  /** The function `headers` failed. */
  | "headers_failed"
  /** No connection, or it broke. */
  | "connection_failed"
  /** The response ended before its result. */
  | "response_ended"
  /** A response came, but not from the service: from a proxy, or at a wrong address. */
  | "other_server";

/** The body of an error of the service, and the data of an `error` event. */
export interface Problem {
  detail: string;
  category: Category | "network";
  code?: ErrorCode | ClientErrorCode | (string & {}) | null;
  provider?: string | null;
  request_id?: string | null;
  retryable?: boolean;
  status?: number;
  partial?: PaidFor | null;
  errors?: FieldError[] | null;
}

/** Headers to send, or a function that returns them; it is called for each attempt. */
export type HeadersOption = HeadersInit | (() => HeadersInit | Promise<HeadersInit>);

export interface Options {
  /** The address of the service, or of the proxy before it, such as https://pets.example.com. */
  service: string;
  /**
   * The idempotency key, one per job. With a key, the job survives a lost connection and is retried
   * until it has a result, and only one video is paid for. Without a key, nothing is retried, since
   * each attempt is paid for, and a lost connection cancels the job.
   */
  key?: string | null | undefined;
  /** Further headers, such as a sign-in. A function may be async and is called for each attempt. */
  headers?: HeadersOption | undefined;
  /** As of `fetch`: "include" sends cookies to another origin too. */
  credentials?: RequestCredentials | undefined;
  /** Stops waiting and throws the signal's reason; without a key, it also cancels the job. */
  signal?: AbortSignal | undefined;
  /** Called with the progress. Each attempt of a job with a key starts again with the stages so far. */
  onStage?: ((stage: StageEvent) => void) | undefined;
  /** Called before each retry, with its cause and the seconds until then. */
  onRetry?: ((error: VideoError, seconds: number) => void) | undefined;
  /** Seconds to wait between attempts, in total, before the last error is thrown. Default: 600. */
  patience?: number | undefined;
  /** Seconds without a byte, after which the stream of a job with a key counts as broken. Default: 45. */
  silence?: number | undefined;
}

/** Every way in which a job can fail. */
export class VideoError extends Error {
  constructor(problem: Problem, options?: ErrorOptions);
  /** What happened, in English; the same as `message`. */
  readonly detail: string;
  /** From the service; "network" if the response did not come from the service, or did not arrive. */
  readonly category: Category | "network";
  /** What happened: a code of the service, of the proxy before it, or a ClientErrorCode. */
  readonly code: ErrorCode | ClientErrorCode | (string & {}) | null;
  /** The HTTP status, or null if there was no response. */
  readonly status: number | null;
  /**
   * The same job with the same key may succeed later: keep both. If it is false, a new attempt needs a
   * new key. A 401 is retryable, but `makeVideo` throws it at once: sign in and call it again.
   */
  readonly retryable: boolean;
  /** The invalid fields. */
  readonly errors: FieldError[];
  /** What is paid for and can still be used. */
  partial: PaidFor;
  readonly provider: string | null;
  /** The same id is in the log of the service. */
  readonly requestId: string | null;
}

/**
 * Make a video: with speech if the job has a `text`, or else a silent one, which only has a `video_url`.
 * Throws a VideoError, or the signal's reason.
 */
export function makeVideo(job: SpeechJob, options: Options): Promise<SpeechVideo>;
export function makeVideo(job: PromptJob, options: Options): Promise<Video>;

/** Parse a body of server-sent events; after `silence` seconds without a byte (0: never) it has ended. */
export function serverSentEvents(
  body: ReadableStream<Uint8Array>,
  silence?: number,
): AsyncGenerator<{ event: string; data: string }, void>;
