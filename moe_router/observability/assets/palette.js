// A look for every expert, safe for colour-blind readers and under dark text.
// Eight hues (Paul Tol's "light" scheme, SRON/EPS/TN/09-002), two depths, then eight textures: 128
// looks. No reader tells 128 colours apart, and textures behind letters hurt, so tokens wear the
// colour alone, and numbers, hover and the legend always say which.
const HUES = ["#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#44bb99", "#99ddff", "#bbcc33", "#aaaa00"];
const INK = "rgb(0 0 0 / .30)";
const TEXTURES = [
  "",
  `repeating-linear-gradient(45deg, ${INK} 0 1.5px, transparent 1.5px 6px)`,
  `repeating-linear-gradient(-45deg, ${INK} 0 1.5px, transparent 1.5px 6px)`,
  `repeating-linear-gradient(0deg, ${INK} 0 1.5px, transparent 1.5px 6px)`,
  `repeating-linear-gradient(90deg, ${INK} 0 1.5px, transparent 1.5px 6px)`,
  `radial-gradient(${INK} 1.3px, transparent 1.6px) 0 0 / 6px 6px`,
  `repeating-linear-gradient(45deg, ${INK} 0 1px, transparent 1px 6px), repeating-linear-gradient(-45deg, ${INK} 0 1px, transparent 1px 6px)`,
  `repeating-linear-gradient(0deg, ${INK} 0 1px, transparent 1px 5px), repeating-linear-gradient(90deg, ${INK} 0 1px, transparent 1px 5px)`,
];

function expertColor(expert, groups) {
  if (expert >= groups) return "#dddddd"; // a null expert
  const hue = HUES[expert % 8], deep = Math.floor(expert / 8) % 2 === 1;
  // 74%: the deepest shade that still gives dark text a contrast of 4.5
  return deep ? `#${rgb(hue).map((v) => Math.round(v * 0.74).toString(16).padStart(2, "0")).join("")}` : hue;
}

function expertLook(expert, groups) {
  const color = expertColor(expert, groups), texture = expert < groups ? TEXTURES[Math.floor(expert / 16) % 8] : "";
  return texture ? `${texture}, ${color}` : color;
}

const expertName = (expert, groups) => (expert >= groups ? `null ${expert - groups}` : `expert ${expert}`);
const expertChip = (expert, groups) => make("span", { className: "chip", style: `background: ${expertLook(expert, groups)}`, textContent: expert >= groups ? "∅" : expert });
