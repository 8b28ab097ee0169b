// The life of a sandbox in the public JavaScript SDK, in three acts. Says "act" after each one and waits for a line.
// Arguments: the SDK's module, and JSON: domain, apiKey, image, useServerProxy.
import assert from "node:assert/strict";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [, , sdk, given] = process.argv;
const { ConnectionConfig, Sandbox, SandboxManager, SandboxApiException } = await import(pathToFileURL(sdk));
const { image, ...connection } = JSON.parse(given);
const config = () => new ConnectionConfig(connection);
const tag = `js-${connection.useServerProxy}`;
const texts = (messages) => messages.map((each) => each.text);
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function betweenActs() {
    console.log("act");
    await lines.next();
}

async function until(ask, what) {
    const end = Date.now() + 45_000;
    while (!(await ask())) {
        assert.ok(Date.now() < end, `waited in vain: ${what}`);
        await new Promise((go) => setTimeout(go, 50));
    }
}

async function refused(call, status) {
    await assert.rejects(call, (error) => error instanceof SandboxApiException && error.statusCode === status);
}

let sandbox = await Sandbox.create({
    connectionConfig: config(),
    image,
    entrypoint: ["sleep", "3600"],
    env: { COLOUR: "red" },
    metadata: { life: tag },
    resource: { cpu: "250m", memory: "128Mi" },
    timeoutSeconds: 600,
});
const info = await sandbox.getInfo();
assert.equal(info.status.state, "Running");
assert.deepEqual(info.metadata, { life: tag });
assert.ok(await sandbox.isHealthy());

const heard = [];
const run = await sandbox.commands.run(
    'echo one; echo "$COLOUR $SIZE"; pwd; echo three >&2; exit 7',
    { workingDirectory: "/tmp", envs: { SIZE: "big" } },
    { onStdout: (event) => heard.push(event.text), onStderr: (event) => heard.push(event.text) },
);
assert.deepEqual(texts(run.logs.stdout), ["one", "red big", "/tmp"]);
assert.deepEqual(texts(run.logs.stderr), ["three"]);
assert.equal(run.exitCode, 7);
assert.equal(heard.length, 4);

const begun = await sandbox.commands.run("echo begun; sleep 3600", { background: true });
const logs = () => sandbox.commands.getBackgroundCommandLogs(begun.id);
await until(async () => (await logs()).content.includes("begun"), "the command in the background has written");
assert.ok((await sandbox.commands.getCommandStatus(begun.id)).running);
await sandbox.commands.interrupt(begun.id);
await until(async () => !(await sandbox.commands.getCommandStatus(begun.id)).running, "it was interrupted");
const session = await sandbox.commands.createSession({ workingDirectory: "/tmp" });
await sandbox.commands.runInSession(session, "export KEPT=yes");
assert.deepEqual(texts((await sandbox.commands.runInSession(session, "echo $KEPT; pwd")).logs.stdout), ["yes", "/tmp"]);
await sandbox.commands.deleteSession(session);
await betweenActs();

const folder = "/tmp/work";
const content = new Uint8Array(300_000).map((_, n) => n % 251);
await sandbox.files.createDirectories([{ path: folder, mode: 750 }]);
await sandbox.files.writeFiles([
    { path: `${folder}/a b+c%2F.bin`, data: content, mode: 640 },
    { path: `${folder}/ü.txt`, data: "one\ntwo\nthree\n" },
]);
assert.deepEqual(Buffer.from(await sandbox.files.readBytes(`${folder}/a b+c%2F.bin`)), Buffer.from(content));
const pieces = [];
for await (const piece of sandbox.files.readBytesStream(`${folder}/a b+c%2F.bin`)) pieces.push(piece);
assert.deepEqual(Buffer.concat(pieces), Buffer.from(content));
assert.equal(await sandbox.files.readFile(`${folder}/ü.txt`, { offset: 2, limit: 1 }), "two\n");
assert.equal(await sandbox.files.readFile(`${folder}/ü.txt`, { range: "bytes=4-6" }), "two");
await sandbox.files.replaceContents([{ path: `${folder}/ü.txt`, oldContent: "two", newContent: "2" }]);
await sandbox.files.moveFiles([{ src: `${folder}/ü.txt`, dest: `${folder}/moved.txt` }]);
await sandbox.files.setPermissions([{ path: `${folder}/moved.txt`, mode: 600 }]);
const moved = (await sandbox.files.getFileInfo([`${folder}/moved.txt`]))[`${folder}/moved.txt`];
assert.equal(moved.mode, 600);
assert.deepEqual(
    (await sandbox.files.search({ path: folder, pattern: "*.txt" })).map((each) => each.path),
    [`${folder}/moved.txt`],
);
assert.equal((await sandbox.files.listDirectory({ path: folder })).length, 2);
await sandbox.files.deleteFiles([`${folder}/moved.txt`]);
await sandbox.files.deleteDirectories([folder]);
await refused(sandbox.files.getFileInfo([folder]), 404);
const measured = await sandbox.getMetrics();
assert.ok(measured.memoryTotalMiB > measured.memoryUsedMiB);

await sandbox.files.writeFiles([{ path: "/srv/page", data: `page of ${tag}` }]);
await sandbox.commands.run("httpd -p 3000 -h /srv");
const { endpoint, headers } = await sandbox.getEndpoint(3000);
const key = connection.useServerProxy ? { "OPEN-SANDBOX-API-KEY": connection.apiKey } : {};
await until(async () => {
    const answer = await fetch(`http://${endpoint}/page`, { headers: { ...headers, ...key } });
    return answer.status === 200 && (await answer.text()) === `page of ${tag}`;
}, "the page is served");
await betweenActs();

await sandbox.renew(7200);
assert.deepEqual((await sandbox.patchMetadata({ life: null, kept: tag })).metadata, { kept: tag });
await sandbox.pause();
await until(async () => (await sandbox.getInfo()).status.state === "Paused", "the sandbox is paused");
sandbox = await sandbox.resume();
assert.deepEqual(texts((await sandbox.commands.run("echo awake")).logs.stdout), ["awake"]);
const again = await Sandbox.connect({ connectionConfig: config(), sandboxId: sandbox.id });
assert.deepEqual(texts((await again.commands.run("echo again")).logs.stdout), ["again"]);
await again.close();
const manager = SandboxManager.create({ connectionConfig: config() });
const found = await manager.listSandboxInfos({ states: ["Running"], metadata: { kept: tag } });
assert.deepEqual(found.items.map((each) => each.id), [sandbox.id]);
await manager.renewSandbox(sandbox.id, 3600);
await manager.close();
await sandbox.kill();
await refused(Sandbox.connect({ connectionConfig: config(), sandboxId: sandbox.id }), 404);
await sandbox.close();
console.log("end");
process.exit(0);
