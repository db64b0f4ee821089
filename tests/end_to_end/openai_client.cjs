"use strict";
// What a program in JavaScript does with the official client. Run by test_openai_node.py, which checks what
// this prints: one JSON object, with what each part saw or `{"failed": why}`.
//
//     NODE_PATH=FOLDER/node_modules node openai_client.cjs http://127.0.0.1:8000/v1 MODEL

const OpenAI = require("openai");
const [, , baseURL, model] = process.argv;
const client = new OpenAI({baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000});

const messages = [{role: "user", content: "Name the capital of France."}];
const parameters = {
  type: "object",
  properties: {city: {type: "string", maxLength: 40}, days: {type: "integer", minimum: 1, maximum: 9}},
  required: ["city", "days"],
  additionalProperties: false,
};
const weather = {type: "function", function: {name: "get_weather", parameters, strict: true}};

const parts = {
  async models() {
    const names = [];
    for await (const each of client.models.list()) names.push(each.id);
    return names;
  },

  async chat() {
    const answer = await client.chat.completions.create({model, messages, temperature: 0, max_tokens: 30});
    return {text: answer.choices[0].message.content, reason: answer.choices[0].finish_reason, usage: answer.usage};
  },

  async stream() {
    const stream = await client.chat.completions.create({
      model, messages, temperature: 0, max_tokens: 30, stream: true, stream_options: {include_usage: true},
    });
    const pieces = [];
    let usage = null, reason = null;
    for await (const chunk of stream) {
      pieces.push(chunk.choices[0]?.delta?.content ?? "");
      reason = chunk.choices[0]?.finish_reason ?? reason;
      usage = chunk.usage ?? usage;
    }
    return {text: pieces.join(""), pieces: pieces.filter(piece => piece).length, reason, usage};
  },

  async helper() {  // the client puts the chunks together by itself
    const runner = client.chat.completions.stream({model, messages, temperature: 0, max_tokens: 30});
    let heard = "";
    runner.on("content", delta => { heard += delta; });
    const text = await runner.finalContent();
    return {text, heard};
  },

  async tools() {
    const body = {model, messages, tools: [weather], tool_choice: "required", parallel_tool_calls: false, temperature: 0, max_tokens: 200};
    const whole = await client.chat.completions.create(body);
    const streamed = await client.chat.completions.stream(body).finalChatCompletion();
    return [whole, streamed].map(({choices: [{message, finish_reason: reason}]}) => ({
      reason, content: message.content,
      calls: message.tool_calls.map(call => ({id: call.id, name: call.function.name, given: JSON.parse(call.function.arguments)})),
    }));
  },

  async loop() {  // the client calls the function, sends the result and asks again
    const called = [];
    const now = {type: "function", function: {
      name: "now", parse: JSON.parse, description: "Tells the time.",
      parameters: {type: "object", properties: {zone: {enum: ["UTC", "CET"]}}, required: ["zone"], additionalProperties: false},
      function: given => { called.push(given.zone); return "It is noon."; },
    }};
    const runner = client.chat.completions.runTools({
      model, messages: [{role: "user", content: "What time is it?"}], tools: [now],
      tool_choice: {type: "function", function: {name: "now"}}, temperature: 0, max_tokens: 60,
    });
    await runner.done();
    return {called, roles: runner.messages.map(message => message.role)};
  },

  async parse() {
    const schema = {...parameters, properties: {...parameters.properties, city: {enum: ["Paris", "Rome"]}}};
    const answer = await client.chat.completions.parse({
      model, messages, temperature: 1, seed: 2, max_tokens: 200,
      response_format: {type: "json_schema", json_schema: {name: "trip", schema, strict: true}},
    });
    return answer.choices[0].message.parsed ?? JSON.parse(answer.choices[0].message.content);
  },

  async responses() {
    const body = {model, input: messages[0].content, temperature: 0, max_output_tokens: 30};
    const made = await client.responses.create(body);
    const kept = await client.responses.retrieve(made.id);
    const types = [];
    let streamed = "";
    for await (const event of await client.responses.create({...body, stream: true})) {
      types.push(event.type);
      if (event.type === "response.output_text.delta") streamed += event.delta;
    }
    const final = await client.responses.stream(body).finalResponse();
    return {text: made.output_text, kept: kept.output_text, streamed, final: final.output_text, types, status: made.status};
  },

  async embeddings() {  // the client asks for base64, unless told otherwise, and decodes it
    const answer = await client.embeddings.create({model, input: ["A cat sleeps.", "Rain."]});
    return answer.data.map(({embedding}) => embedding.reduce((sum, x) => sum + x * x, 0));
  },

  async errors() {
    const seen = [];
    for (const [body, kind] of [
      [{model, messages, temperature: 3}, OpenAI.BadRequestError],
      [{model: "gpt-5", messages}, OpenAI.NotFoundError],
    ]) {
      try {
        await client.chat.completions.create(body);
        seen.push(null);
      } catch (error) {
        seen.push({
          isRightClass: error instanceof kind, status: error.status, type: error.type, param: error.param,
          code: error.code, requestID: error.requestID, message: error.message,
        });
      }
    }
    return seen;
  },

  async abort() {
    const stream = await client.completions.create({model, prompt: "Once upon a time", max_tokens: 1500, ignore_eos: true, stream: true});
    let chunks = 0;
    for await (const _ of stream) if (++chunks === 5) break;  // leaving the loop ends the request
    const controller = new AbortController();
    const other = await client.completions.create(
      {model, prompt: "Once upon a time", max_tokens: 1500, ignore_eos: true, stream: true}, {signal: controller.signal});
    for await (const _ of other) if (++chunks === 10) controller.abort();
    return {chunks, isAborted: controller.signal.aborted};
  },
};

(async () => {
  const seen = {};
  for (const [name, part] of Object.entries(parts)) {
    try {
      seen[name] = await part();
    } catch (error) {
      seen[name] = {failed: error.stack};
    }
  }
  console.log(JSON.stringify(seen));
})();
