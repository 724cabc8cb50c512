//! What may be shown on an operator's terminal.

use serde_json::Value;

/// Words of a peer, of QEMU, or (through QEMU's output) of a guest, without what would command a terminal.
pub fn harmless(text: &str) -> String {
    let shown = |c: char| if c.is_control() && !"\n\t".contains(c) { char::REPLACEMENT_CHARACTER } else { c };
    text.chars().map(shown).collect()
}

/// The same for all texts of an answer.
pub fn make_harmless(answer: &mut Value) {
    match answer {
        Value::String(text) if text.contains(char::is_control) => *text = harmless(text),
        Value::Array(items) => items.iter_mut().for_each(make_harmless),
        Value::Object(fields) => fields.values_mut().for_each(make_harmless),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_commands_the_operators_terminal() {
        let mut answer = serde_json::json!({
            "notes": ["two\nlines\tand a tab", "\u{1b}]0;title\u{7}", {"said": "\u{9b}2J\r✓ all is well"}],
            "n": 18_446_744_073_709_551_615_u64, "x": 0.1
        });
        make_harmless(&mut answer);
        assert_eq!(answer["notes"][0], "two\nlines\tand a tab");
        assert_eq!(answer["notes"][1], "\u{fffd}]0;title\u{fffd}");
        assert_eq!(answer["notes"][2]["said"], "\u{fffd}2J\u{fffd}✓ all is well");
        assert_eq!((answer["n"].as_u64(), answer["x"].as_f64()), (Some(u64::MAX), Some(0.1)));
    }
}
