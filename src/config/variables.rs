//! Environment variables in a configuration's text: `${NAME}`, `${NAME:-default}`. `$${` stands for `${`. Comments stay as they are.

/// Puts the values of variables in their places. `variable` looks one up. Values are escaped as texts in double quotes need it, so
/// whatever is in them stays one value, and lines keep their numbers.
///
/// # Errors
/// A sentence with the line, when a variable is not set and has no default, or a brace is missing. It shows no value.
pub fn substitute(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let (said, comment) = line.split_at(comment_start(line));
        substitute_line(said, &variable, &mut out).map_err(|what| format!("line {}: {what}", index + 1))?;
        out.push_str(comment);
    }
    Ok(out)
}

/// Where a line's comment begins; its length when it has none. (No key takes a text of several lines, so quotes end with their line.)
fn comment_start(line: &str) -> usize {
    let (mut quote, mut is_escaped) = (None, false);
    for (at, byte) in line.bytes().enumerate() {
        match (quote, byte) {
            _ if is_escaped => is_escaped = false,
            (Some(b'"'), b'\\') => is_escaped = true,
            (Some(open), _) if byte == open => quote = None,
            (None, b'"' | b'\'') => quote = Some(byte),
            (None, b'#') => return at,
            _ => {}
        }
    }
    line.len()
}

fn substitute_line(line: &str, variable: &impl Fn(&str) -> Option<String>, out: &mut String) -> Result<(), String> {
    let mut rest = line;
    while let Some(at) = rest.find("${") {
        let before = &rest[..at];
        if let Some(literal) = before.strip_suffix('$') {
            out.push_str(literal);
            out.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        out.push_str(before);
        let (inner, behind) = rest[at + 2..].split_once('}').ok_or("a ${ has no }")?;
        let (name, default) =
            inner.split_once(":-").map_or((inner, None), |(name, default)| (name, Some(default.to_owned())));
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Err(format!("'{name}' is no name of an environment variable"));
        }
        // Set to nothing is not set, as in a shell's ${NAME:-default}.
        let value = variable(name).filter(|value| !value.is_empty()).or(default).ok_or_else(|| {
            format!("the environment variable {name} is not set; ${{{name}:-…}} would give a value for that case")
        })?;
        push_escaped(&value, out);
        rest = behind;
    }
    out.push_str(rest);
    Ok(())
}

/// As TOML's basic strings have it (<https://toml.io/en/v1.0.0#string>).
fn push_escaped(value: &str, out: &mut String) {
    for character in value.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            control if control.is_control() => out.push_str(&format!("\\u{:04X}", control as u32)),
            other => out.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_up(name: &str) -> Option<String> {
        let known = [("HOME_DIR", "/home/me"), ("ODD", "a\"b\\c\nd"), ("EMPTY", "")];
        known.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn values_and_defaults() {
        for (text, expected) in [
            ("path = \"${HOME_DIR}/app.db\"", "path = \"/home/me/app.db\""),
            ("a = \"${NOT_SET:-x}${EMPTY:-y}\"", "a = \"xy\""),
            ("a = \"${NOT_SET:-}\"", "a = \"\""),
            ("a = \"$${HOME_DIR}\"", "a = \"${HOME_DIR}\""),
            ("a = \"$5\"", "a = \"$5\""),
            ("# ${NOT_SET}\n", "# ${NOT_SET}\n"),
            ("  # ${NOT_SET}\na = 1 # it's ${NOT_SET}\n", "  # ${NOT_SET}\na = 1 # it's ${NOT_SET}\n"),
            ("a = \"#${HOME_DIR}\" # ${\n", "a = \"#/home/me\" # ${\n"),
            ("a = \"\\\"#${HOME_DIR}\"", "a = \"\\\"#/home/me\""),
            ("a = '\\' # ${NOT_SET}", "a = '\\' # ${NOT_SET}"),
        ] {
            assert_eq!(substitute(text, look_up).as_deref(), Ok(expected), "{text}");
        }
        let odd = substitute("a = \"${ODD}\"", look_up).unwrap();
        assert_eq!(toml::from_str::<toml::Table>(&odd).unwrap()["a"].as_str(), Some("a\"b\\c\nd"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, says) in [
            ("a = 1\nb = \"${NOT_SET}\"", "line 2: the environment variable NOT_SET is not set"),
            ("b = \"${NOT_SET\"", "line 1: a ${ has no }"),
            ("b = \"${NOT SET}\"", "'NOT SET' is no name"),
            ("b = \"${EMPTY}\"", "EMPTY is not set"),
        ] {
            let error = substitute(text, look_up).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
