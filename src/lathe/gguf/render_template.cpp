// Renders a chat template with llama.cpp's own Jinja engine.
//
// Reads {"template": TEXT, "time": SECONDS, "contexts": [{NAME: VALUE}, ...]} from standard input, and writes a list
// with {"text": TEXT} or {"error": TEXT} for each context to standard output. Built by lathe.gguf.jinja_engine.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <iostream>
#include <iterator>
#include <string>

#include "ggml.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

// llama.cpp's assertions end here; the rest of its library is not needed.
extern "C" void ggml_abort(const char * file, int line, const char * format, ...) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, format);
    std::abort();
}

static std::string render(const std::string & source, const common_json & variables, std::time_t time) {
    jinja::lexer lexer;
    auto tokens = lexer.tokenize(source);
    jinja::program program = jinja::parse_from_tokens(tokens);
    jinja::context context(source);
    context.current_time = time;
    jinja::global_from_json(context, variables, false);
    jinja::runtime runtime(context);
    const jinja::value results = runtime.execute(program);
    return jinja::runtime::gather_string_parts(results)->as_string().str();
}

int main() {
    const std::string input((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
    const common_json request = common_json::parse(input);
    const std::string source = request.at("template").get<std::string>();
    const std::time_t time = request.at("time").get<int64_t>();
    const common_json & contexts = request.at("contexts");
    common_json answers = common_json::array();
    for (size_t i = 0; i < contexts.size(); i++) {
        common_json answer = common_json::object();
        try {
            answer["text"] = render(source, contexts.at(i), time);
        } catch (const std::exception & error) {
            answer["error"] = std::string(error.what());
        }
        answers.push_back(answer);
    }
    std::cout << answers.dump_safe();
    return 0;
}
