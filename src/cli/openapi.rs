//! `t2m openapi`: the OpenAPI document on standard output.

use anyhow::Context;

use super::say;

pub fn run() -> anyhow::Result<()> {
    let document = crate::http::openapi::describe();
    say(format_args!("{}", document.to_pretty_json().context("writing the document")?));
    Ok(())
}
