// Renders sprites: one JSON object a line on standard input, raw RGBA of SIZE x SIZE a sprite on standard output.
// {"kind": "character", "options": {...}} is DiceBear's avataaars; {"kind": "object", "icon": "cat"} is Noto emoji.
import { createAvatar } from "@dicebear/core";
import * as avataaars from "@dicebear/avataaars";
import { Resvg } from "@resvg/resvg-js";
import { readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import readline from "node:readline";

const size = Number(process.argv[2] ?? 112);
const noto = JSON.parse(readFileSync(createRequire(import.meta.url).resolve("@iconify-json/noto/icons.json"), "utf8"));

function svgOf(spec) {
  if (spec.kind === "character") return createAvatar(avataaars, { seed: "x", ...spec.options }).toString();
  const icon = noto.icons[spec.icon];
  if (!icon) throw new Error(`no Noto icon called ${spec.icon}`);
  const width = icon.width ?? noto.width ?? 128;
  const height = icon.height ?? noto.height ?? 128;
  return `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 ${width} ${height}">${icon.body}</svg>`;
}

function writeAll(buffer) {
  for (let offset = 0; offset < buffer.length; ) {
    try {
      offset += writeSync(1, buffer, offset);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error;
    }
  }
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  if (!line.trim()) continue;
  const image = new Resvg(svgOf(JSON.parse(line)), { fitTo: { mode: "width", value: size } }).render();
  if (image.width !== size || image.height !== size) throw new Error(`sprite is ${image.width}x${image.height}: ${line}`);
  writeAll(Buffer.from(image.pixels));
}
