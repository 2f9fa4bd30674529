// client.d.ts describes client.js. implementation.js is a copy of client.js: its types come from its own code.
import type * as declared from "./client.js";
import * as written from "./implementation.js";

type Declared = typeof declared;
type Written = typeof written;
type SameKeys<A, B> = [keyof A, keyof B] extends [keyof B, keyof A] ? true : never;

export const described: Declared = written;
export const complete: [
  SameKeys<Declared, Written>,
  SameKeys<declared.VideoError, written.VideoError>,
] = [true, true];
