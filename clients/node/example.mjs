// A fedmini device from Node.js: node example.mjs SOCKET   or   node example.mjs 127.0.0.1:PORT TOKEN_FILE
// It asks the model, teaches it two answers, shows how the device stands, and with --forget erases everything again.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const proto = fileURLToPath(new URL("../proto/device.proto", import.meta.url));
const definition = protoLoader.loadSync(proto, { keepCase: true, longs: Number, defaults: true });
const { Device } = grpc.loadPackageDefinition(definition).fedmini.device.v1;

const [place, tokenFile] = process.argv.slice(2).filter((argument) => argument !== "--forget");
if (place === undefined) {
  console.error("usage: node example.mjs SOCKET [--forget], or node example.mjs 127.0.0.1:PORT TOKEN_FILE [--forget]");
  process.exit(2);
}
const metadata = new grpc.Metadata();
if (tokenFile !== undefined) metadata.set("fedmini-token", readFileSync(tokenFile, "utf8").trim());

const address = tokenFile === undefined ? `unix:${resolve(place)}` : place;
const device = new Device(address, grpc.credentials.createInsecure(), { "grpc.enable_http_proxy": 0 });
const soon = () => Date.now() + 60_000;
const call = (method, request = {}) => promisify(device[method].bind(device))(request, metadata, { deadline: soon() });

try {
  await promisify(device.waitForReady.bind(device))(soon());

  process.stdout.write("the model says: ");
  const question = { prompt: "Tea or coffee?", max_new_tokens: 40 };
  for await (const piece of device.Reply(question, metadata)) process.stdout.write(piece.text);
  process.stdout.write("\n");

  const examples = [{ prompt: "Tea or coffee?", response: "Tea, always." }, { response: "A text that answers nothing." }];
  console.log(`taught: ${(await call("AddExamples", { examples })).num_added} examples`);

  const status = await call("Status");
  console.log(`keeps: ${status.num_examples} examples, their key in ${status.key_kept_in}`);
  console.log(`not training: ${status.why_not_training ?? "it is, when it is asked"}`);
  for (const offer of status.offers) console.log(`consent to ${offer.manifest_hash}?\n  ${offer.terms.join("\n  ")}`);

  let numReceipts = 0;
  for await (const receipt of device.Receipts({}, metadata)) {
    numReceipts += 1;
    console.log(`left: ${receipt.size_bytes} masked bytes for ${receipt.run_id}, round ${receipt.round_num}`);
  }
  console.log(`receipts: ${numReceipts}`);

  if (process.argv.includes("--forget")) {
    await call("Forget");
    console.log(`after forgetting: ${(await call("Status")).num_examples} examples`);
  }
} catch (error) {
  console.error(error.code === undefined ? error.message : `${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  device.close();
}
