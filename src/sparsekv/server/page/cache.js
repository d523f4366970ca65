// The cache beside the conversation: tokens shaded by how many heads hold them, heads by the share that they hold.

const at = (id) => document.getElementById(id);

export function bytes(count) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (count < 1024) return `${Number(count.toPrecision(3))} ${unit}`;
    count /= 1024;
  }
  return `${Number(count.toPrecision(3))} GiB`;
}

export class CacheView {
  constructor() {
    this.spans = [];
  }

  clear() {
    this.spans = [];
    at("cache-text").replaceChildren();
    at("map").replaceChildren();
    for (const id of ["bar", "scale", "map-title"]) at(id).hidden = true;
    at("empty").hidden = false;
  }

  // look: what a chunk of a watched stream says; see server/chat.py.
  show(look) {
    const text = at("cache-text");
    const follow = text.scrollTop + text.clientHeight >= text.scrollHeight - 8;
    if (look.first === 0) {
      text.replaceChildren();
      this.spans = [];
    }
    for (const piece of look.texts) {
      const span = document.createElement("span");
      span.textContent = piece;
      this.spans.push(span);
      text.append(span);
    }
    look.held.forEach((held, i) => {
      this.spans[i].style.setProperty("--s", held / look.heads);
      this.spans[i].title = `${held} of ${look.heads} heads`;
    });
    if (follow) text.scrollTop = text.scrollHeight;
    this.bar(look);
    this.map(look);
    at("empty").hidden = true;
    for (const id of ["bar", "scale", "map-title"]) at(id).hidden = false;
  }

  bar(look) {
    const share = Math.min(1, look.bytes / look.dense_bytes);
    const ratio = (look.held.length * look.heads) / look.held.reduce((sum, held) => sum + held, 0);
    const text = `${bytes(look.bytes)} of pages, where dense holds ${bytes(look.dense_bytes)} of keys and values; ` +
      `${look.held.length} tokens, ratio ${ratio.toFixed(2)}`;
    at("bar-held").style.width = `${100 * share}%`;
    at("bar-picture").setAttribute("aria-label", text);
    at("bar-text").textContent = text;
  }

  map(look) {
    const table = at("map");
    if (table.rows.length !== look.lengths.length) {
      table.replaceChildren(...look.lengths.map((heads, layer) => {
        const row = document.createElement("tr");
        const name = document.createElement("th");
        name.textContent = layer;
        name.scope = "row";
        row.append(name, ...heads.map(() => document.createElement("td")));
        return row;
      }));
    }
    look.lengths.forEach((heads, layer) => heads.forEach((length, head) => {
      const cell = table.rows[layer].cells[head + 1];
      const share = Math.min(1, length / look.held.length);
      cell.style.setProperty("--s", share);
      cell.textContent = Math.round(100 * share);
      cell.title = `layer ${layer}, head ${head}: ${length} of ${look.held.length} tokens`;
    }));
  }
}
