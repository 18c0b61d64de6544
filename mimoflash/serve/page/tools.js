/** Tools that run in the browser, each switched on by the user. Small and safe: text in, text out, nothing is evaluated. */

/** @type {Record<string, {label: string, hint: string, definition: object, run: (input: object) => string}>} */
export const TOOLS = {
  calculator: {
    label: "Calculator",
    hint: "+ − × ÷, powers, roots, logarithms, trigonometry",
    definition: {
      type: "function",
      function: {
        name: "calculator",
        description: "Computes an arithmetic expression, such as (3 + 4) * sqrt(2) ^ 3.",
        parameters: {
          type: "object", properties: { expression: { type: "string", description: "the expression" } }, required: ["expression"],
        },
      },
    },
    run: ({ expression }) => String(calculate(String(expression))),
  },
  clock: {
    label: "Date and time",
    hint: "this device's clock and time zone",
    definition: {
      type: "function",
      function: {
        name: "current_date_and_time",
        description: "Tells the current date, time and time zone of the user.",
        parameters: { type: "object", properties: {} },
      },
    },
    run: () => now(),
  },
};

/** The definitions to send: what is switched on, and what the user answers by hand. */
export function definitions(switchedOn, byHand) {
  const ours = Object.entries(TOOLS).filter(([key]) => switchedOn[key]).map(([, tool]) => tool.definition);
  return [...ours, ...byHand];
}

/** Runs a call if its tool is switched on; returns the result's text, or null where a person has to answer. */
export function runTool(call, switchedOn) {
  const found = Object.entries(TOOLS).find(([key, tool]) => switchedOn[key] && tool.definition.function.name === call.name);
  if (!found) return null;
  try {
    return found[1].run(JSON.parse(call.arguments || "{}"));
  } catch (error) {
    return `Error: ${error instanceof SyntaxError ? "the arguments are not JSON" : error.message}`;
  }
}

/** Checks the user's own definitions. @returns {object[]} or throws an Error that says what is wrong */
export function parseDefinitions(text) {
  if (!text.trim()) return [];
  let list;
  try {
    list = JSON.parse(text);
  } catch {
    throw new Error("Own tools: not JSON");
  }
  if (!Array.isArray(list)) throw new Error("Own tools: a list [ … ] of definitions is needed");
  return list.map((entry, at) => {
    const definition = entry?.type === "function" ? entry : { type: "function", function: entry };
    if (!/^[\w-]{1,64}$/.test(definition.function?.name ?? "")) {
      throw new Error(`Own tools: definition ${at + 1} has no name of letters, digits, _ and -`);
    }
    return definition;
  });
}

function now() {
  const date = new Date();
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  const local = date.toLocaleString("en-GB", { dateStyle: "full", timeStyle: "long" });
  return `${local} (${zone}; ${date.toISOString()})`;
}

const CONSTANTS = { pi: Math.PI, e: Math.E };
const FUNCTIONS = {
  sqrt: Math.sqrt, cbrt: Math.cbrt, abs: Math.abs, exp: Math.exp, ln: Math.log, log: Math.log10, log2: Math.log2,
  sin: Math.sin, cos: Math.cos, tan: Math.tan, asin: Math.asin, acos: Math.acos, atan: Math.atan,
  floor: Math.floor, ceil: Math.ceil, round: Math.round, min: Math.min, max: Math.max,
};

/** Recursive descent: sum -> product -> power -> factor. `^` and `**` bind to the right, tighter than a sign. */
export function calculate(expression) {
  if (expression.length > 1000) throw new Error("the expression is longer than 1000 characters");
  const tokens = expression.replace(/−/g, "-").replace(/×/g, "*").replace(/÷/g, "/")
    .match(/\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|[a-z]\w*|\*\*|\S/gi) ?? [];
  let at = 0;
  const take = (...wanted) => (wanted.includes(tokens[at]) ? tokens[at++] : null);
  const need = (wanted) => {
    if (!take(wanted)) throw new Error(`"${wanted}" expected ${tokens[at] ? `before "${tokens[at]}"` : "at the end"}`);
  };

  function sum() {
    let value = product();
    for (let sign; (sign = take("+", "-"));) value = sign === "+" ? value + product() : value - product();
    return value;
  }
  function product() {
    let value = signed();
    for (let sign; (sign = take("*", "/", "%"));) {
      const other = signed();
      value = sign === "*" ? value * other : sign === "/" ? value / other : value % other;
    }
    return value;
  }
  function signed() {
    const sign = take("-", "+");
    return sign ? (sign === "-" ? -signed() : signed()) : power();
  }
  function power() {
    const base = factor();
    return take("^", "**") ? base ** signed() : base;
  }
  function factor() {
    const token = tokens[at++];
    if (token === undefined) throw new Error("the expression ends too early");
    if (/^[\d.]/.test(token)) return Number(token);
    if (token === "(") {
      const value = sum();
      need(")");
      return value;
    }
    const name = token.toLowerCase();
    if (Object.hasOwn(CONSTANTS, name)) return CONSTANTS[name];
    if (!Object.hasOwn(FUNCTIONS, name)) throw new Error(`"${token}" is unknown`);
    need("(");
    const values = [sum()];
    while (take(",")) values.push(sum());
    need(")");
    return FUNCTIONS[name](...values);
  }

  const value = sum();
  if (at < tokens.length) throw new Error(`"${tokens[at]}" is not expected`);
  return Number.isFinite(value) ? Number(value.toPrecision(15)) : value;
}
