-- wrk over kept connections: chats of 200 different words, or of one long text, whole or streamed.
-- usage: wrk -t 1 -c 32 -d 5s -s benches/router.lua URL -- MODEL WORDS TOKENS [stream]
-- The last line says requests a second, p50 and p99 in milliseconds, requests, failures.

local json = { ["Content-Type"] = "application/json" }
local words = {
   "the", "model", "serves", "a", "cluster", "of", "machines", "and", "answers", "every",
   "question", "about", "Router", "latency", "throughput", "tokenizer", "is", "measured", "with",
   "many", "words,", "in", "plain", "English.", "What", "does", "it", "cost", "to", "read",
   "them?", "It's", "2026", "für", "naïve", "(see", "below)", "42%", "e.g.", "request",
}
local bodies, at = {}, 0

function init(arguments)
   local model, count, tokens = arguments[1], tonumber(arguments[2]), arguments[3]
   local more = arguments[4] == "stream" and ', "stream": true' or ""
   math.randomseed(1)
   for i = 1, count > 1000 and 16 or 256 do
      local text = {}
      for j = 1, count do
         text[j] = words[math.random(#words)]
      end
      local message = '{"role": "user", "content": "' .. i .. " " .. table.concat(text, " ") .. '"}'
      local body = string.format(
         '{"model": "%s", "messages": [%s], "max_tokens": %s%s}', model, message, tokens, more)
      bodies[i] = wrk.format("POST", "/v1/chat/completions", json, body)
   end
end

function request()
   at = at % #bodies + 1
   return bodies[at]
end

function done(summary, latency)
   local errors = summary.errors
   local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
   print(string.format("RESULT %.1f %.3f %.3f %d %d", summary.requests / summary.duration * 1e6,
      latency:percentile(50) / 1000, latency:percentile(99) / 1000, summary.requests, failed))
end
