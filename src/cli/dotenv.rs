//! The file `.env`, whose lines are settings.

use std::path::PathBuf;

use super::BadConfiguration;

/// Takes what `.env` says into the environment, where that does not say otherwise: the file here, or in
/// the nearest directory above that has one.
///
/// # Errors
/// A line for each line of it that cannot be read, naming its variable and never showing its value.
pub fn load() -> Result<(), BadConfiguration> {
    let Some(path) = find() else { return Ok(()) };
    let unreadable = |error: &dyn std::fmt::Display| {
        BadConfiguration(vec![format!(".env: reading {}: {error}", path.display())])
    };
    let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&error))?;
    let faults = faults_of(&text);
    if !faults.is_empty() {
        return Err(BadConfiguration(faults));
    }
    // What it would say of a line holds the value.
    dotenvy::from_read(whole(&text).as_bytes()).map_err(|_| unreadable(&"no settings"))
}

fn find() -> Option<PathBuf> {
    let here = std::env::current_dir().ok()?;
    here.ancestors().map(|directory| directory.join(".env")).find(|path| path.is_file())
}

/// Without a byte order mark, and with an end to its last line, which not everything may lack.
fn whole(text: &str) -> String {
    format!("{}\n", text.trim_start_matches('\u{feff}'))
}

/// A setting is a line, or several if a quote goes on.
fn faults_of(text: &str) -> Vec<String> {
    let text = whole(text);
    let lines: Vec<&str> = text.lines().collect();
    let (mut faults, mut at) = (Vec::new(), 0);
    while at < lines.len() {
        let is_read = |end: &usize| {
            let setting = format!("{}\n", lines[at..*end].join("\n"));
            dotenvy::from_read_iter(setting.as_bytes()).all(|read| read.is_ok())
        };
        if let Some(end) = (at + 1..=lines.len()).find(is_read) {
            at = end;
            continue;
        }
        let line = at + 1;
        match variable_of(lines[at]) {
            Some(variable) => faults.push(format!(
                "{variable}: line {line} of .env cannot be read; a value with blanks, # or $ goes \
                 in single quotes"
            )),
            // After another it may be the rest of a value.
            None if faults.is_empty() => {
                faults.push(format!(".env: line {line} is no NAME=VALUE"));
            }
            None => {}
        }
        at += 1;
    }
    faults
}

fn variable_of(line: &str) -> Option<&str> {
    let (name, _) = line.split_once('=')?;
    let name = name.trim();
    let name = name.strip_prefix("export ").unwrap_or(name).trim();
    let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "_.".contains(c));
    Some(name).filter(|name| !name.is_empty() && is_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, then: &[(&str, usize)]) {
        let faults = faults_of(text);
        assert_eq!(faults.len(), then.len(), "{text:?}: {faults:?}");
        for (fault, (name, line)) in faults.iter().zip(then) {
            assert!(fault.starts_with(&format!("{name}: line {line} ")), "{fault}");
            assert!(!fault.contains("new") && !fault.contains("old"), "{fault} shows a value");
        }
    }

    #[test]
    fn a_line_that_cannot_be_read_is_named_and_its_value_not_shown() {
        check("", &[]);
        check("\u{feff}# a comment\n\n A=1 # old\nexport B='new, old'\r\nC= \nD=x ", &[]);
        check("A='-----BEGIN KEY-----\nnew==\n-----END KEY-----'\nB=1", &[]);
        check("A=1\nB=new, old\nC=2\n", &[("B", 2)]);
        check("A=command:new old\nexport B = new old", &[("A", 1), ("B", 2)]);
        check("A='1'\nB='new\nC=old\n", &[("B", 2)]);
        check("A=-----BEGIN KEY-----\nnew+old\n-----END KEY-----\n", &[("A", 1)]);
        check("new old\nA=1", &[(".env", 1)]);
    }

    #[test]
    fn what_the_example_shows_can_be_taken_as_it_stands() {
        let example = include_str!("../../.env.example");
        let setting = |line: &str| variable_of(line).is_some_and(|it| it == it.to_uppercase());
        let lines = example.lines().filter_map(|line| line.strip_prefix('#'));
        let settings: Vec<&str> = lines.filter(|line| setting(line)).collect();
        assert!(settings.len() > 50, "{settings:?}");
        assert_eq!(faults_of(&settings.join("\n")), [] as [String; 0]);
        assert!(settings.iter().any(|line| line.contains("command:")), "{settings:?}");
    }
}
