// Chromium for the tests of the page, out of the npm package that carries it whole: `node get_browser.mjs FOLDER`, where
// FOLDER/node_modules has @sparticuz/chromium. FOLDER/browser is there at the end, or not at all.
import {execFileSync} from "node:child_process";
import {createReadStream, createWriteStream} from "node:fs";
import {chmod, mkdir, rename, rm, writeFile} from "node:fs/promises";
import {join, resolve} from "node:path";
import {pipeline} from "node:stream/promises";
import {createBrotliDecompress} from "node:zlib";

const folder = resolve(process.argv[2]);
const packed = join(folder, "node_modules", "@sparticuz", "chromium", "bin");
const made = join(folder, "browser.new"), final = join(folder, "browser");
const unpack = async (from, to) => {
  await pipeline(createReadStream(join(packed, from)), createBrotliDecompress(), createWriteStream(join(made, to)));
};

await rm(made, {recursive: true, force: true});
await mkdir(made, {recursive: true});
await unpack("chromium.br", "chromium");
await chmod(join(made, "chromium"), 0o755);
for (const name of ["al2023", "fonts"]) {  // shared libraries in lib/; a font for machines without any
  await unpack(`${name}.tar.br`, `${name}.tar`);
  execFileSync("tar", ["xf", join(made, `${name}.tar`), "-C", made]);
  await rm(join(made, `${name}.tar`));
}
const places = ["/usr/share/fonts", "/usr/local/share/fonts", join(final, "fonts")];
await writeFile(join(made, "fonts.conf"), `<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
${places.map(place => `  <dir>${place}</dir>`).join("\n")}
  <cachedir>${join(final, "fonts-cache")}</cachedir>
</fontconfig>
`);
await rm(final, {recursive: true, force: true});
await rename(made, final);
