// What llama.cpp makes of a text: one line in, "<add_special> <parse_special> <text in hex>", one line of token ids out.
#include "llama.h"

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char **argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s VOCABULARY.gguf < requests\n", argv[0]);
        return 2;
    }
    llama_log_set([](ggml_log_level level, const char *text, void *) {
        if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
    }, nullptr);
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model *model = llama_model_load_from_file(argv[1], params);
    if (model == nullptr) return 1;
    const llama_vocab *vocab = llama_model_get_vocab(model);
    for (std::string line; std::getline(std::cin, line);) {
        std::string text;
        for (size_t i = 4; i + 1 < line.size(); i += 2) {
            text.push_back(static_cast<char>(std::stoi(line.substr(i, 2), nullptr, 16)));
        }
        std::vector<llama_token> ids(text.size() + 16);
        const int count = llama_tokenize(vocab, text.data(), static_cast<int>(text.size()), ids.data(),
                                         static_cast<int>(ids.size()), line[0] == '1', line[2] == '1');
        for (int i = 0; i < count; ++i) std::printf(i > 0 ? " %d" : "%d", ids[i]);
        std::printf("\n");
    }
    return 0;
}
