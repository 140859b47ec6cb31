-- wrk over kept connections: good requests between refused ones of every kind. Every answer must
-- come, in order, on the connection that asked: `Socket errors` in wrk's report is a fault.
-- usage: wrk -t 1 -c 16 -d 10s --timeout 60s -s benches/mixed.lua http://127.0.0.1:8000 -- MODEL

local json = { ["Content-Type"] = "application/json" }
local long = string.rep("x", 65536)
local mix, threads, at = {}, {}, 0

function setup(thread)
   table.insert(threads, thread)
end

local function add(method, path, body)
   table.insert(mix, wrk.format(method, path, json, body))
end

function init(arguments)
   local model = arguments[1] or error("name the model after --")
   local chat = "/v1/chat/completions"
   local function ask(name, more)
      local message = '{"role": "user", "content": "Hi"}'
      return string.format('{"model": "%s", "messages": [%s]%s}', name, message, more)
   end
   add("GET", "/v1/models")
   add("POST", chat, ask(model, ', "max_tokens": 1'))
   add("POST", "/v1/nothing", long)
   add("POST", chat, ask(model, ', "max_tokens": 1, "stream": true'))
   add("PUT", chat, long)
   add("POST", chat, '{"model": ')
   add("GET", "/health", long)
   add("POST", chat, ask("absent", ""))
   add("POST", chat, ask(model, ', "temperature": -1'))
   add("POST", chat, ask(model, ', "max_tokens": 1000000'))
   add("OPTIONS", chat)
   add("POST", "/v1/completions", string.rep(" ", 5 * 1048576))
   counts = ""
   seen = {}
end

function request()
   at = at % #mix + 1
   return mix[at]
end

function response(status)
   seen[status] = (seen[status] or 0) + 1
   counts = ""
   for code, count in pairs(seen) do
      counts = counts .. code .. ":" .. count .. " "
   end
end

function done(summary)
   local errors = summary.errors
   for _, thread in ipairs(threads) do
      print("answers by status: " .. thread:get("counts"))
   end
   local broken = errors.connect + errors.read + errors.write + errors.timeout
   print(string.format("requests: %d, socket errors: %d", summary.requests, broken))
end
