//! Holds the floors of the house: a module uses only what lies on a lower one.

use std::path::{Path, PathBuf};

const FLOORS: [&[&str]; 6] = [
    &["clock", "config", "telemetry"],
    &["domain", "log"],
    &["views", "clerk", "media"],
    &["actors"],
    &["http"],
    &["cli"],
];

/// What a module must not touch although its floor would allow it.
const NEVER: [(&str, &[&str]); 6] = [
    (
        "domain",
        &[
            "tokio",
            "actix",
            "actix_web",
            "rusqlite",
            "reqwest",
            "rand",
            "crate::clock",
            "std::env",
            "std::fs",
            "std::io",
            "std::net",
            "std::process",
            "std::thread",
            "Instant",
            "SystemTime",
        ],
    ),
    ("log", &["domain"]),
    ("views", &["crate::log"]),
    ("clerk", &["crate::log"]),
    ("media", &["crate::log"]),
    ("http", &["crate::log", "rusqlite", "std::fs"]),
];

#[test]
fn no_module_reaches_above_its_floor() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    // Tests stand outside the floors: they may look at the disk to see what was done.
    let is_test = |path: &PathBuf| path.to_string_lossy().ends_with("tests.rs");
    for path in sources(&root).into_iter().filter(|path| !is_test(path)) {
        let inside = path.strip_prefix(&root).unwrap().with_extension("");
        let module = inside.iter().next().unwrap().to_str().unwrap();
        let faults = faults_of(module, &std::fs::read_to_string(&path).unwrap());
        assert!(faults.is_empty(), "{} uses {faults:?}", path.display());
    }
}

#[test]
fn a_planted_import_is_caught() {
    let check = |module, code: &str, then: &[&str]| assert_eq!(faults_of(module, code), then);
    check("domain", "use crate::log::Recorded;", &["crate::log"]);
    check("domain", "use std::{fmt, fs::{self, File}};", &["std::fs"]);
    check("domain", "async { tokio::spawn(f) }", &["tokio"]);
    check("domain", "use crate::clock::Clock;", &["crate::clock"]);
    check("domain", "let id: u64 = rand::random();", &["rand"]);
    check("domain", "use std::{env, net::TcpStream};", &["std::env", "std::net"]);
    check("domain", "use std::time::{Duration, Instant};", &["Instant"]);
    check("domain", "std::time::SystemTime::now()", &["SystemTime"]);
    check("views", "use crate::{\n    clock::Clock,\n    log::{Log, Head},\n};", &["crate::log"]);
    check("actors", "crate::http::serve()", &["crate::http"]);
    check("http", "let c = rusqlite::Connection::open(p);", &["rusqlite"]);
    check("clock", "use crate::brand_new::Thing;", &["crate::brand_new"]);
    check("http", "// never use crate::cli\nuse crate::actors::codec;", &[]);
}

/// What `code` of `module` uses and may not; `lib` and `main` stand outside the floors.
fn faults_of(module: &str, code: &str) -> Vec<String> {
    let floor_of = |name: &str| FLOORS.iter().position(|floor| floor.contains(&name));
    let Some(floor) = floor_of(module) else { return vec![] };
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let names = names(&lines.collect::<Vec<_>>().join("\n"));
    let never = NEVER.iter().find(|(name, _)| *name == module).map_or(&[][..], |(_, never)| *never);
    let too_high = |name: &str| name != module && floor_of(name).is_none_or(|it| it >= floor);
    let barred = |name: &String| {
        never.contains(&name.as_str()) || name.strip_prefix("crate::").is_some_and(too_high)
    };
    names.into_iter().filter(barred).collect()
}

/// Every word, and `crate::x` and `std::x` for the names right below those two, groups included.
fn names(code: &str) -> Vec<String> {
    let spaced: String = ["::", "{", "}", ","]
        .iter()
        .fold(code.to_owned(), |code, sign| code.replace(sign, &format!(" {sign} ")));
    let is_sign = |c: char| !c.is_alphanumeric() && !"_:{},".contains(c);
    let tokens: Vec<&str> = spaced.split(is_sign).filter(|token| !token.is_empty()).collect();
    let mut names: Vec<String> = tokens.iter().map(|token| (*token).to_owned()).collect();
    for (at, path) in tokens.windows(3).enumerate() {
        let (root, grouped) = (path[0], path[2] == "{");
        if !matches!(root, "crate" | "std") || path[1] != "::" {
            continue;
        }
        let (mut depth, mut first) = (0, true);
        for token in &tokens[at + 2..] {
            depth += i32::from(*token == "{") - i32::from(*token == "}");
            if first && !matches!(*token, "{" | "}" | ",") {
                names.push(format!("{root}::{token}"));
            }
            first = depth == 1 && matches!(*token, "{" | ",");
            if !grouped || depth == 0 {
                break;
            }
        }
    }
    names
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("src reads");
    let paths = entries.map(|entry| entry.expect("an entry reads").path());
    let all = paths.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] });
    all.filter(|path| path.extension().is_some_and(|it| it == "rs")).collect()
}
