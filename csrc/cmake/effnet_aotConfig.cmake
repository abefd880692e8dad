# effnet_aot::effnet_aot: the library, and its headers.
#
#   find_package(effnet_aot CONFIG REQUIRED)   # -DCMAKE_PREFIX_PATH=$(python -c "import effnet_aot; print(effnet_aot.cmake_prefix_path)")
#   target_link_libraries(app PRIVATE effnet_aot::effnet_aot)
#
# libtorch is the consumer's to bring. It is not looked for here: the Torch package of a CUDA build of torch insists on the
# CUDA toolkit, which this library does not need. Without that package, see examples/cpp/CMakeLists.txt.
cmake_minimum_required(VERSION 3.18)

get_filename_component(_effnet_aot_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET effnet_aot::effnet_aot)
  add_library(effnet_aot::effnet_aot SHARED IMPORTED)
  set_target_properties(effnet_aot::effnet_aot PROPERTIES
    IMPORTED_LOCATION "${_effnet_aot_root}/lib/libeffnet_aot.so"
    IMPORTED_SONAME libeffnet_aot.so
    INTERFACE_INCLUDE_DIRECTORIES "${_effnet_aot_root}/include"
    # Calls through the dispatcher name no symbol of the library, and many toolchains link with --as-needed.
    INTERFACE_LINK_OPTIONS "LINKER:--push-state,--no-as-needed,${_effnet_aot_root}/lib/libeffnet_aot.so,--pop-state")
  target_compile_features(effnet_aot::effnet_aot INTERFACE cxx_std_17)
endif()

unset(_effnet_aot_root)
