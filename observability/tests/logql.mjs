// Reads a JSON array of LogQL expressions, writes for each whether Grafana's own grammar takes it: null, or where it does not.
import { parser } from '@grafana/lezer-logql';
import { readFileSync } from 'node:fs';

const complaint = (expression) => {
  let at = null;
  parser.parse(expression).iterate({
    enter: (node) => {
      if (at === null && node.type.isError) {
        at = `${expression.slice(0, node.from)}<here>${expression.slice(node.from)}`;
      }
    },
  });
  return at;
};

console.log(JSON.stringify(JSON.parse(readFileSync(0, 'utf8')).map(complaint)));
