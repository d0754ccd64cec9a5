//! `t2m openapi`: the OpenAPI document on standard output.

use anyhow::Context;

use super::hand_over;

pub fn run() -> anyhow::Result<()> {
    let document = crate::http::openapi::describe();
    hand_over(&document.to_pretty_json().context("writing the document")?)?;
    Ok(())
}
